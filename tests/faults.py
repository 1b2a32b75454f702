"""Faults for a run that is a process of its own: what is hit, and how.

A fault is injected and, where it is a state rather than an event, lifted again. What it hits is
found among the run's processes by their command lines.
"""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.run_process import Driver, wait_for
from torchspec_lib.config.settings import PROJECT_ROOT

FREEZE_S, SHORTAGE_S = 3.0, 6.0
SMALL_FILE_BYTES = 64 << 10


@dataclass(frozen=True)
class Scene:
    """A run, to be disturbed."""

    driver: Driver
    folder: Path
    """The run's."""
    chance: random.Random

    def find(self, title: str) -> psutil.Process:
        """One of the processes whose command line begins with ``title``, or ends its program so."""

        def matching() -> list[psutil.Process]:
            found = []
            for process in self.driver.processes():
                program = process.info["cmdline"][0]
                if program.startswith(title) or program.endswith(f"/{title}"):
                    found.append(process)
            return found

        return self.chance.choice(wait_for(matching, f"process {title}", 60))

    def wait_for_save(self) -> None:
        """Until a checkpoint is being written."""
        checkpoints = self.folder / "checkpoints"
        deadline = time.monotonic() + 60
        while not list(checkpoints.glob("step_*.tmp")):
            assert time.monotonic() < deadline, "no checkpoint is being written"
            time.sleep(0.002)
        time.sleep(self.chance.uniform(0, 0.05))


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run."""

    name: str
    strike: Callable[[Scene], None]
    is_loss: bool = True
    """Whether a part is lost, which the run has to note and replace."""
    ends_driver: bool = False
    """Whether the command has to be given again."""


def hit(title: str, number: int) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        os.kill(scene.find(title).pid, number)

    return strike


def while_saving(strike: Callable[[Scene], None]) -> Callable[[Scene], None]:
    def strike_later(scene: Scene) -> None:
        scene.wait_for_save()
        strike(scene)

    return strike_later


def signal_driver(number: int) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.driver.process.send_signal(number)

    return strike


def freeze_driver(scene: Scene) -> None:
    scene.driver.process.send_signal(signal.SIGSTOP)
    time.sleep(FREEZE_S)
    scene.driver.process.send_signal(signal.SIGCONT)


def fill_store(scene: Scene) -> None:
    """Other samples take all the room there is, for a while."""
    client = scene.find("mooncake_client").cmdline()
    host, port = (_argument(client, name) for name in ("host", "port"))
    command = [sys.executable, "-m", "tests.fill_store", f"{host}:{port}", str(SHORTAGE_S)]
    subprocess.run(command, cwd=PROJECT_ROOT, check=True, timeout=120)


def _argument(command: list[str], name: str) -> str:
    return next(
        match[1] for part in command if (match := re.fullmatch(f"--{name}=(.*)", part)) is not None
    )


def fill_disk(scene: Scene) -> None:
    """No trainer can write a large file until a save has failed; then there is room again."""

    def num_failures() -> int:
        return scene.driver.said().count("event=not_saved")

    before = num_failures()
    with _small_files_only(scene):
        wait_for(lambda: num_failures() > before, "save that fails", 60)


@contextmanager
def _small_files_only(scene: Scene) -> Iterator[None]:
    ranks = [
        process
        for process in scene.driver.processes()
        if process.info["cmdline"][0].startswith("ray::TrainerActor")
    ]
    before = {rank.pid: resource.prlimit(rank.pid, resource.RLIMIT_FSIZE) for rank in ranks}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            if psutil.pid_exists(pid):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


ENGINE, TRAINER = "ray::EngineActor", "ray::TrainerActor"
CONTROLLER, MANAGER = "ray::AsyncTrainingController", "ray::AsyncInferenceManager"
MASTER, CLIENT = "mooncake_master", "mooncake_client"
KILL, STOP = signal.SIGKILL, signal.SIGSTOP

FAULTS = (
    Fault("kill an engine", hit(ENGINE, KILL)),
    Fault("kill a trainer while it saves", while_saving(hit(TRAINER, KILL))),
    Fault("kill the client process", hit(CLIENT, KILL)),
    Fault("stop a trainer", hit(TRAINER, STOP)),
    Fault("fill the disk", fill_disk, is_loss=False),
    Fault("kill the driver while it saves", while_saving(signal_driver(KILL)), ends_driver=True),
    Fault("stop an engine", hit(ENGINE, STOP)),
    Fault("kill the controller", hit(CONTROLLER, KILL)),
    Fault("fill the store", fill_store, is_loss=False),
    Fault("kill the master", hit(MASTER, KILL)),
    Fault("kill a trainer", hit(TRAINER, KILL)),
    Fault("stop the master", hit(MASTER, STOP)),
    Fault("kill the manager", hit(MANAGER, KILL)),
    Fault("stop the client process", hit(CLIENT, STOP)),
    Fault("terminate the driver", signal_driver(signal.SIGTERM), ends_driver=True),
    Fault("stop the controller", hit(CONTROLLER, STOP)),
    Fault("freeze the driver", freeze_driver, is_loss=False),
    Fault("kill the driver", signal_driver(KILL), ends_driver=True),
    Fault("stop the manager", hit(MANAGER, STOP)),
    Fault("kill the actor of the master", hit("ray::MooncakeMaster", KILL), ends_driver=True),
)
"""The first few of them are the short suite."""
