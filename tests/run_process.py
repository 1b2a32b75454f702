"""A training run as a process of its own, and all that it starts."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import PROJECT_ROOT

TINY = PROJECT_ROOT / "examples" / "tiny_target"


def config(data_root: Path, num_prompts: int = 24, **changes: Any) -> RunConfig:
    values = {
        "model": {"target": str(TINY), "dtype": "float32"},
        "data": {
            "train": [str(TINY / "train.jsonl")],
            "heldout": [str(TINY / "heldout.jsonl")],
            "max_length": 512,
            "max_prompts": num_prompts,
        },
        "draft": {"vocab_size": 256, "ttt_steps": 3},
        "training": {
            "training_num_gpus_per_node": 2,
            "global_batch_size": 5,
            "learning_rate": 5e-3,
            "compute_dtype": "float32",
        },
        "cluster": {"device": "cpu"},
        "data_root": str(data_root),
    }
    return RunConfig.model_validate(values | changes)


class Driver:
    """A run in a process, and everything that it started."""

    def __init__(self, run: RunConfig, tmp_path: Path) -> None:
        file = tmp_path / "run.json"
        file.write_text(run.model_dump_json())
        self.temp = tmp_path / "t"
        self.temp.mkdir(exist_ok=True)
        env = os.environ | {"TMPDIR": str(self.temp), "RAY_ADDRESS": "local"}
        self._shm_before = shared_memory()
        # Not through pipes: nobody reads them while a test waits for something else.
        self._out, self._err = tmp_path / "out.txt", tmp_path / "err.txt"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.drive", str(file)],
                cwd=PROJECT_ROOT,
                env=env,
                stdout=out,
                stderr=err,
            )

    def finish(self, timeout_s: float = 240) -> tuple[int, str, str]:
        """Wait for its end: exit code, output, errors."""
        code = self.process.wait(timeout_s)
        return code, self._out.read_text(), self._err.read_text()

    def said(self) -> str:
        """Output and errors so far."""
        return self._out.read_text() + self._err.read_text()

    def summary(self, timeout_s: float = 240) -> dict[str, Any]:
        code, out, err = self.finish(timeout_s)
        assert code == 0, err[-3000:]
        summary: dict[str, Any] = json.loads(out.splitlines()[-1])
        return summary

    def processes(self) -> list[psutil.Process]:
        """All that belong to it, itself left out."""
        return [
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if (process.info["environ"] or {}).get("TMPDIR") == str(self.temp)
            and process.pid != self.process.pid
            and process.info["cmdline"]
        ]

    def leftovers(self) -> list[str]:
        """Processes, shared memory and temporary folders that the run should have taken along."""
        found = [" ".join(process.info["cmdline"])[:120] for process in self.processes()]
        found += sorted(shared_memory() - self._shm_before)
        return found + [str(path) for path in self.temp.iterdir() if path.name.startswith("ts-")]

    def wait_until_gone(self, timeout_s: float) -> None:
        """Until nothing is left of it but its results."""
        deadline = time.monotonic() + timeout_s
        while self.leftovers() and time.monotonic() < deadline:
            time.sleep(0.2)
        left = self.leftovers()
        assert not left, f"left behind: {left}"


def shared_memory() -> set[str]:
    """Files there, but for the semaphores of other programs."""
    return {
        str(path) for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.loky-")
    }


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
    """Wait until ``condition`` gives something true; gives that."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} after {timeout_s} s"
        time.sleep(0.1)
    return found


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
