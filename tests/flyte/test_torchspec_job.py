"""The plugin: what it hands to a task, what it leaves behind, which failures it calls curable."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from flytekit import task
from flytekit.exceptions.base import FlyteRecoverableException

from tasks.torchspec_job import TorchSpecJob
from torchspec_lib.errors import EngineError, WorkerLostError


@dataclass
class Cluster:
    """Two parts that come up one after the other, and what happens to them."""

    events: list[str] = field(default_factory=list)
    failure: Exception | None = None

    @contextmanager
    def up(self, number: int) -> Iterator[str]:
        with self._part("store"), self._part("engines"):
            yield f"a cluster for {number}"

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self.events.append(f"{name} up")
        if self.failure is not None:
            raise self.failure
        try:
            yield
        finally:
            self.events.append(f"{name} down")


UP_AND_DOWN = ["store up", "engines up", "engines down", "store down"]


def train_with(cluster: Cluster, work: Callable[[str], str]) -> str:
    job = TorchSpecJob(bring_up=cluster.up, groups=())

    @task(task_config=job)
    def train(number: int, cluster: str) -> str:
        return work(cluster)

    assert list(train.python_interface.inputs) == ["number"]
    result: str = train(number=3)
    return result


def raising(error: BaseException) -> Callable[[str], str]:
    def work(_cluster: str) -> str:
        raise error

    return work


def test_a_task_gets_the_cluster_that_its_inputs_ask_for() -> None:
    cluster = Cluster()
    assert train_with(cluster, str.upper) == "A CLUSTER FOR 3"
    assert cluster.events == UP_AND_DOWN


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (EngineError("hf-0", "out of memory"), EngineError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (WorkerLostError("trainer rank 1", "killed"), FlyteRecoverableException),
    ],
)
def test_whatever_ends_a_task_its_cluster_goes_in_reverse(
    raised: BaseException, expected: type[BaseException]
) -> None:
    cluster = Cluster()
    with pytest.raises(expected):
        train_with(cluster, raising(raised))
    assert cluster.events == UP_AND_DOWN


def test_a_preempted_task_takes_its_cluster_down() -> None:
    cluster = Cluster()
    before = signal.getsignal(signal.SIGTERM)

    def be_preempted(_cluster: str) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "ran on"

    with pytest.raises(SystemExit) as ended:
        train_with(cluster, be_preempted)
    assert ended.value.code == 128 + signal.SIGTERM
    assert cluster.events == UP_AND_DOWN
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_a_lost_worker_is_worth_a_retry() -> None:
    with pytest.raises(FlyteRecoverableException, match="lost trainer rank 1: killed"):
        train_with(Cluster(), raising(WorkerLostError("trainer rank 1", "killed")))
    with pytest.raises(EngineError, match="out of memory"):
        train_with(Cluster(), raising(EngineError("hf-0", "out of memory")))


def test_a_worker_lost_while_coming_up_is_worth_a_retry_too() -> None:
    cluster = Cluster(failure=WorkerLostError("engine 0", "killed"))
    with pytest.raises(FlyteRecoverableException, match="lost engine 0"):
        train_with(cluster, str.upper)
    assert cluster.events == ["store up"]
