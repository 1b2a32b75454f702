"""A watched program comes back, until that is no use. Here the program is ``sleep``."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from torchspec_lib.errors import StoreUnavailableError
from torchspec_lib.transfer.mooncake.managed_process import ManagedProcess
from torchspec_lib.transfer.mooncake.watch import Patience, Watch

PART = "sleep on 10.0.0.7"


@pytest.fixture
def process() -> Iterator[ManagedProcess]:
    process = ManagedProcess("sleep", ["60"])
    yield process
    process.stop()


def patience(max_restarts: int = 2, steady_s: float = 60.0, pause_s: float = 0.05) -> Patience:
    return Patience(max_restarts, hang_timeout_s=0.1, pause_s=pause_s, steady_s=steady_s)


def watch(
    process: ManagedProcess, patience: Patience, is_silent: Callable[[], bool] = lambda: False
) -> Watch:
    return Watch(process, PART, lambda: True, is_silent, patience)


def kill(process: ManagedProcess) -> None:
    os.kill(process.pid, signal.SIGKILL)


def wait_for_recovery(watch: Watch, number: int) -> None:
    deadline = time.monotonic() + 20
    while len(watch.recoveries()) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_ended_is_started_again_and_told_with_cause_and_time(process: ManagedProcess):
    kept, first = watch(process, patience()), process.pid
    kill(process)
    wait_for_recovery(kept, 1)
    assert process.is_running
    assert process.pid != first
    (recovery,) = kept.recoveries()
    assert (recovery.part, recovery.cause) == (PART, "ended by SIGKILL")
    assert 0.05 <= recovery.seconds < 10


def test_what_answers_no_more_is_killed_and_started_again_even_if_it_is_stopped(
    process: ManagedProcess,
):
    first = process.pid
    kept = watch(process, patience(), is_silent=lambda: process.pid == first)
    os.kill(first, signal.SIGSTOP)
    wait_for_recovery(kept, 1)
    assert process.pid != first
    assert kept.recoveries()[0].cause.startswith("didn't answer for")


def test_one_unanswered_question_isnt_a_silence(process: ManagedProcess):
    answers = iter([True, False])
    kept = watch(process, patience(), is_silent=lambda: next(answers, False))
    time.sleep(5)
    assert process.is_running
    assert kept.recoveries() == []


def test_what_ends_again_and_again_is_given_up_with_its_last_words(process: ManagedProcess):
    kept = watch(process, patience(max_restarts=2))
    for number in (1, 2):
        kill(process)
        wait_for_recovery(kept, number)
    assert not kept.ended.done()
    kill(process)
    with pytest.raises(
        StoreUnavailableError, match=rf"{PART}: it ended by SIGKILL after 2 .*sleep ended.*log"
    ):
        kept.ended.result(timeout=20)
    assert len(kept.recoveries()) == 2


def test_restarts_count_from_zero_after_a_while_of_being_up(process: ManagedProcess):
    kept = watch(process, patience(max_restarts=1, steady_s=0.2))
    for number in (1, 2, 3):
        kill(process)
        wait_for_recovery(kept, number)
        time.sleep(0.5)
    assert not kept.ended.done()


def test_a_silence_doesnt_count_as_being_up(process: ManagedProcess):
    kept = watch(process, patience(max_restarts=1, steady_s=3.0), is_silent=lambda: True)
    with pytest.raises(StoreUnavailableError, match=r"didn't answer .* after 1 restarts"):
        kept.ended.result(timeout=30)


def test_what_doesnt_get_up_again_is_given_up(process: ManagedProcess):
    def dies_before_it_is_up() -> bool:
        kill(process)
        return False

    kept = Watch(process, PART, dies_before_it_is_up, lambda: False, patience(max_restarts=3))
    kill(process)
    with pytest.raises(StoreUnavailableError, match="after 3 restarts in a row"):
        kept.ended.result(timeout=20)
    assert kept.recoveries() == []


def test_what_is_stopped_stays_so_and_the_watch_ends(process: ManagedProcess):
    kept = watch(process, patience())
    process.stop()
    assert kept.ended.result(timeout=20) is None
    assert kept.recoveries() == []


def test_a_stop_during_the_pause_before_a_restart_is_not_waited_for(process: ManagedProcess):
    kept = watch(process, patience(pause_s=60.0))
    kill(process)
    time.sleep(0.3)
    process.stop()
    assert kept.ended.result(timeout=5) is None
    assert not process.is_running
