"""A data set of Hugging Face's, from a server on this machine."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40
MESSAGES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
ROW = (json.dumps({"messages": MESSAGES}) + "\n").encode()


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face's HTTP interface as one data set of one file needs."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        entry = {"type": "file", "path": "train.jsonl", "size": len(ROW), "oid": "b" * 40}
        if path == f"/datasets/me/chats/resolve/{COMMIT}/train.jsonl":
            self.answer(200, ROW, {"ETag": '"c"', "X-Repo-Commit": COMMIT})
        elif path.startswith(f"/api/datasets/me/chats/tree/{COMMIT}"):
            self.answer(200, json.dumps([entry]).encode())
        elif path in ("/api/datasets/me/chats", f"/api/datasets/me/chats/revision/{COMMIT}"):
            files = [{"rfilename": "train.jsonl"}]
            self.answer(
                200, json.dumps({"id": "me/chats", "sha": COMMIT, "siblings": files}).encode()
            )
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_hugging_face_data_set_is_streamed_at_its_current_commit(tmp_path):
    code = (
        "from torchspec_lib.data.conversations import open_source\n"
        "from torchspec_lib.errors import ConfigError\n"
        "source = open_source('me/chats', 'train', 'data.train[0]')\n"
        "print(source.digest())\n"
        "print([(c.where, len(c.messages)) for c in source.conversations()])\n"
        "try:\n"
        "    list(open_source('me/chats', 'tset', 'data.train[0]').conversations())\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    with hub() as url:
        env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        out = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )
    assert out.returncode == 0, out.stderr
    digest, rows, error = out.stdout.splitlines()
    assert digest == f"me/chats@{COMMIT}#train"
    assert rows == "[('me/chats[train] row 1', 2)]"
    assert error.startswith("data.split: can't read me/chats: Bad split: tset")
