"""A run that is interrupted takes its Ray along."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.run_process import is_alive
from torchspec_lib.config.settings import PROJECT_ROOT

pytestmark = pytest.mark.ray

INTERRUPTED_RUN = """
import json, os, sys, time
import psutil, ray
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.cluster_plans import make_plan
from torchspec_lib.ray.cluster import ray_session
from torchspec_lib.ray.placement_group import create_placement_groups

class Child:
    def start(self):
        import subprocess, torchspec_lib
        return subprocess.Popen(["sleep", "300"]).pid, torchspec_lib.__file__

with ray_session(make_plan()) as session:
    placement = create_placement_groups(make_plan(), 30)
    slot = placement.training[0]
    actor = ray.remote(Child).options(**slot.options("training")).remote()
    child, package = ray.get(actor.start.remote())
    pids = [p.pid for p in psutil.Process().children(recursive=True)]
    up = dict(pids=pids, child=child, package=package, origin=session.origin)
    print(json.dumps(up), flush=True)
    time.sleep(120)
"""


def test_an_interrupted_run_from_another_folder_leaves_nothing(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    environ |= {"HOME": str(home), "RAY_ADDRESS": "local"}
    with tempfile.TemporaryDirectory(dir="/tmp") as temp:
        run = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED_RUN.format(root=str(PROJECT_ROOT))],
            cwd=tmp_path,
            env=environ | {"TMPDIR": temp},
            stdout=subprocess.PIPE,
            text=True,
        )
        up = json.loads(run.stdout.readline())
        assert up["origin"] == "started"
        assert Path(up["package"]).is_relative_to(PROJECT_ROOT)
        assert up["child"] in up["pids"]
        assert len(list(Path(temp).iterdir())) == 1
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
        assert [pid for pid in up["pids"] if is_alive(pid)] == []
        assert list(Path(temp).iterdir()) == []
    assert list(home.iterdir()) == []
