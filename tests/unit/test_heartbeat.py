import threading
import time

import pytest

from torchspec_lib.errors import WorkerLostError
from torchspec_lib.training.heartbeat import Heartbeat


class Control:
    """Notes beats, and is lost after ``lives`` of them."""

    def __init__(self, lives=10**9):
        self.beats, self.lives = [], lives
        self.changed = threading.Condition()

    def beat(self, rank, doing):
        with self.changed:
            self.beats.append((rank, doing))
            self.changed.notify_all()
        if len(self.beats) > self.lives:
            raise WorkerLostError("the controller", "killed")

    def wait_for(self, num_beats):
        with self.changed:
            return self.changed.wait_for(lambda: len(self.beats) >= num_beats, 5)


def _is_beating():
    return "heartbeat" in {thread.name for thread in threading.enumerate()}


def test_it_beats_at_once_and_then_again_with_what_is_done_by_then():
    control, doing = Control(), ["training step 1"]
    with Heartbeat(control, 3, 0.05, lambda: doing[0]):
        assert control.wait_for(1)
        doing[0] = "saving step 1"
        assert control.wait_for(3)
    assert control.beats[0] == (3, "training step 1")
    assert control.beats[-1] == (3, "saving step 1")
    assert not _is_beating()
    num_beats = len(control.beats)
    time.sleep(0.15)
    assert len(control.beats) == num_beats


def test_ending_does_not_wait_for_the_next_beat():
    start = time.monotonic()
    with Heartbeat(Control(), 0, 60.0, lambda: ""):
        pass
    assert time.monotonic() - start < 5


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_control_plane_that_is_lost_ends_it_quietly():
    control = Control(lives=1)
    with Heartbeat(control, 0, 0.01, lambda: ""):
        assert control.wait_for(2)
        deadline = time.monotonic() + 5
        while _is_beating() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _is_beating()
    assert len(control.beats) == 2
