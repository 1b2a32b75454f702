"""Pushing a registered draft to the Hugging Face Hub: to a stand-in for it on this machine."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from tests.candidates import make_report
from tests.integration.test_registry import make_run, trained
from torchspec_lib.errors import ConfigError, RecoverableError
from torchspec_lib.pipeline import preflight
from torchspec_lib.registry.hub import check_access, push
from torchspec_lib.registry.registry import register_draft

REPOSITORY = "me/tiny-draft"
PUSH = {"push_to_hub": REPOSITORY}


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push talks to. Files are committed as regular ones."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: list[dict] = []
        self.commits: list[str] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.status: int | None = None
        """Answer everything with this."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        self._answer({"id": REPOSITORY, "sha": f"{len(self.server.commits):040x}"})

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        hub.tokens.add(self.headers["Authorization"])
        if hub.status is not None:
            self._answer({"error": "no"}, hub.status)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            exists = len(hub.created) > 1
            self._answer({"url": f"{hub.url}/{REPOSITORY}"}, 409 if exists else 200)
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlibrary_name: sglang\n")
            self._answer({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{REPOSITORY}/preupload/main":
            self._answer({"files": [self._upload(file) for file in json.loads(body)["files"]]})
        elif self.path == f"/api/models/{REPOSITORY}/commit/main":
            self._commit(body)
        else:
            self._answer({"error": f"unknown {self.path}"}, 404)

    def _upload(self, file):
        content = self.server.files.get(file["path"])
        answer = {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
        if content is not None:
            blob = b"blob %d\0%b" % (len(content), content)
            answer["oid"] = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
        return answer

    def _commit(self, body):
        header, *changes = [json.loads(line) for line in body.splitlines()]
        self.server.commits.append(header["value"]["summary"])
        for change in changes:
            value = change["value"]
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        oid = f"{len(self.server.commits):040x}"
        url = f"{self.server.url}/{REPOSITORY}/commit/{oid}"
        self._answer({"commitUrl": url, "commitOid": oid})

    def _answer(self, body, status=200):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The tests are not; nor do they leave this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # What HF_ENDPOINT sets, which the library reads when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))


@pytest.fixture
def draft(tmp_path):
    folder = trained(tmp_path, b"weights").draft_dir
    (folder / "README.md").write_text("---\nlibrary_name: sglang\n---\n# A draft\n")
    return folder


def registry(**settings):
    return make_run("/nowhere", **PUSH | settings).registry


def test_a_champion_is_pushed_with_its_card_and_what_is_there_is_not_sent_again(hub, tmp_path):
    run = make_run(tmp_path / "root", **PUSH)
    first = register_draft(run, trained(tmp_path / "1", b"first"))
    assert first.hub == f"{hub.url}/{REPOSITORY} at commit 000000000000"
    assert f"hub            {first.hub}" in first.summary.splitlines()
    assert hub.created[0]["name"] == "tiny-draft"
    assert hub.created[0]["visibility"] == "private"
    assert hub.commits == ["eagle3-draft version 1"]
    assert hub.files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert hub.files["model.safetensors"] == b"first"
    assert f"--speculative-draft-model-path {REPOSITORY}" in hub.files["README.md"].decode()
    assert hub.tokens == {"Bearer hf_secret"}

    again = register_draft(run, trained(tmp_path / "1", b"first"))
    assert again.is_champion
    assert hub.commits == ["eagle3-draft version 1"]

    shorter = make_report(accept_length=3.0)
    worse = register_draft(run, trained(tmp_path / "2", b"worse", report=shorter))
    assert worse.hub == "not pushed: it isn't the champion"
    longer = make_report(accept_length=4.0)
    register_draft(run, trained(tmp_path / "3", b"better", report=longer))
    assert hub.commits == ["eagle3-draft version 1", "eagle3-draft version 3"]
    assert hub.files["model.safetensors"] == b"better"
    assert "4.00" in hub.files["README.md"].decode()


def test_a_dry_run_lists_what_would_be_pushed_and_sends_nothing(hub, no_token, draft):
    settings = registry(push_dry_run=True)
    check_access(settings)
    told = push(draft, settings, "1")
    assert told == (
        "dry run, nothing sent: me/tiny-draft would hold README.md (39 bytes), "
        "config.json (2 bytes), model.safetensors (7 bytes)"
    )
    assert not hub.tokens


def test_a_run_that_is_to_be_pushed_needs_a_token_before_it_starts(no_token, monkeypatch):
    run = make_run("/nowhere", **PUSH)
    with pytest.raises(ConfigError, match=r"registry\.push_to_hub: there is no token .*HF_TOKEN"):
        preflight(run)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    check_access(run.registry)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        preflight(run)


def test_a_repository_that_the_hub_would_not_take_is_refused_before_a_run_starts():
    run = make_run("/nowhere", push_to_hub="me/draft--1", push_dry_run=True)
    with pytest.raises(ConfigError, match=r"registry\.push_to_hub: .*'me/draft--1'"):
        preflight(run)


@pytest.mark.parametrize(("status", "error"), [(403, ConfigError), (500, RecoverableError)])
def test_a_refusal_is_the_users_and_a_failure_is_tried_again(hub, draft, status, error):
    hub.status = status
    with pytest.raises(error, match="me/tiny-draft"):
        push(draft, registry(), "1")


def test_a_hub_that_is_not_there_is_tried_again(hub, draft, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RecoverableError, match="can't be reached"):
        push(draft, registry(), "1")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"push_to_hub": "draft"}, "must be owner/name"),
        ({"push_to_hub": "../draft"}, "must be owner/name"),
        ({"push_dry_run": True}, "do nothing without push_to_hub"),
        ({"push_private": False}, "do nothing without push_to_hub"),
    ],
)
def test_settings_of_a_push_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make_run("/nowhere", **settings)
