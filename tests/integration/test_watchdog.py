"""Real actors that die, hang, or get nowhere."""

import os
import signal
import tempfile
import time

import pytest
import ray

from tests.cluster_plans import make_plan
from torchspec_lib.errors import HungError, WorkerLostError
from torchspec_lib.ray.cluster import ray_session
from torchspec_lib.ray.failures import get
from torchspec_lib.ray.watchdog import Watchdog
from torchspec_lib.types import Pulse

pytestmark = pytest.mark.ray

TIMEOUT_S = 1.0


class Part:
    """Gets on with each pulse, or not."""

    def __init__(self, moves: bool = True) -> None:
        self._moves, self._progress = moves, 0

    def pulse(self) -> Pulse:
        self._progress += self._moves
        return Pulse(self._progress, ("training step 7",))

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module")
def start():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        patch.setattr(tempfile, "tempdir", None)
        with ray_session(make_plan()):
            yield _started


def _started(moves: bool = True):
    part = ray.remote(Part).options(num_cpus=0).remote(moves)
    get(part.pid.remote())
    return part


def watch(parts: dict, seconds: float) -> None:
    watchdog = Watchdog(parts, TIMEOUT_S)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watchdog.check()
        time.sleep(watchdog.interval_s)


def test_parts_that_get_on_are_left_in_peace(start):
    parts = {"one": start(), "other": start(moves=False)}
    watch(parts, 3 * TIMEOUT_S)


def test_a_part_that_does_not_answer_is_named(start):
    stopped = start()
    pid = get(stopped.pid.remote())
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(HungError, match="lost the controller: no answer for 1 s"):
            watch({"the manager": start(), "the controller": stopped}, 20)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_parts_that_answer_and_get_nowhere_say_what_they_were_doing(start):
    with pytest.raises(HungError, match="s: training step 7"):
        watch({"the controller": start(moves=False)}, 20)


def test_a_part_that_dies_is_told_from_one_that_hangs(start):
    part = start()
    os.kill(get(part.pid.remote()), signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="lost the controller") as caught:
        watch({"the controller": part}, 20)
    assert not isinstance(caught.value, HungError)


def test_an_answer_that_does_not_come_is_named_too(start):
    stopped = start()
    pid = get(stopped.pid.remote())
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(HungError, match="lost the manager: no answer for 1 s"):
            get(stopped.pulse.remote(), 1.0, "the manager")
    finally:
        os.kill(pid, signal.SIGKILL)
