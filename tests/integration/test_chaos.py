"""Runs that are disturbed again and again end with the very draft of an undisturbed one.

``--faults 60`` (``make chaos``) is the long form, the default the short one. What every fault
cost is printed.
"""

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import FAULTS, Fault, Scene
from tests.run_process import Driver, config, wait_for
from torchspec_lib.config.run import RunConfig
from torchspec_lib.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.mooncake, pytest.mark.chaos]

FAULTS_PER_RUN = 10
NUM_PROMPTS = 240
RECOVERY_TIMEOUT_S = 150.0


def make_run(data_root: Path, num_faults: int) -> RunConfig:
    """Long enough for so many faults, as far as they hit the same run."""
    return config(
        data_root,
        NUM_PROMPTS,
        training={
            "training_num_gpus_per_node": 2,
            "num_epochs": 3 + min(num_faults, FAULTS_PER_RUN),
            "global_batch_size": 5,
            "learning_rate": 1e-3,
            "compute_dtype": "float32",
            "checkpoint_interval": 15,
        },
        inference={"request_size": 2},
        recovery={"hang_timeout_s": 8.0, "max_restarts": 20},
    )


class DisturbedRun:
    """A run, and the history of what happened to it."""

    def __init__(self, tmp_path: Path, num_faults: int, chance: random.Random) -> None:
        self._tmp_path, self._chance = tmp_path, chance
        self.run = make_run(tmp_path / "data", num_faults)
        self.driver = Driver(self.run, tmp_path)
        self.history: list[tuple[str, float]] = []

    @property
    def folder(self) -> RunFolder:
        return RunFolder(
            wait_for(lambda: next(self.run.data_path.glob("runs/*/"), None), "run folder")
        )

    def last_step(self) -> int:
        """The last finished step that was ever noted, though it may have been undone since."""
        metrics = self.folder.metrics
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    def num_recoveries(self) -> int:
        noted = self.folder.recoveries
        num_noted = noted.read_text().count("\n") if noted.is_file() else 0
        return num_noted + self.driver.said().count("event=recovered")

    def strike(self, fault: Fault) -> None:
        """Let it happen; wait until the run has recovered and taken a step never taken before."""
        before = self.last_step()
        self._wait_for(lambda: self.last_step() > before, "step")
        time.sleep(self._chance.uniform(0, 2))
        if self.is_over:
            return
        highest, num_recoveries, start = self.last_step(), self.num_recoveries(), time.monotonic()
        fault.strike(Scene(self.driver, self.folder.path, self._chance))
        if fault.ends_driver:
            self.driver.finish()
            wait_for(lambda: not self.driver.processes(), "end of the actors", 60)
            highest = self.last_step()  # ranks go on for a moment without their driver
            self.driver = Driver(self.run, self._tmp_path)
        elif fault.is_loss:
            self._wait_for(lambda: self.num_recoveries() > num_recoveries, fault.name)
        self._wait_for(lambda: self.last_step() > highest, fault.name)
        self.history.append((fault.name, time.monotonic() - start))
        print(f"  {fault.name:32} {self.history[-1][1]:6.1f} s", flush=True)

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        wait_for(lambda: condition() or self.is_over, what, RECOVERY_TIMEOUT_S)

    @property
    def is_over(self) -> bool:
        return self.driver.process.poll() is not None


def draft_digest(folder: RunFolder) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.draft.iterdir())
    }


@pytest.fixture(scope="module")
def num_faults(request):
    return request.config.getoption("--faults")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, num_faults):
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    run = make_run(tmp_path / "data", num_faults)
    summary = Driver(run, tmp_path).summary()
    folder = RunFolder(run.data_path / "runs" / summary["run_id"])
    return draft_digest(folder), [step.loss for step in folder.read_metrics()]


@pytest.mark.timeout(7200)
def test_a_disturbed_run_ends_with_the_draft_of_an_undisturbed_one(
    undisturbed, num_faults, tmp_path_factory, request
):
    seed = request.config.getoption("--seed")
    chance = random.Random(seed)
    faults = [FAULTS[i % len(FAULTS)] for i in range(num_faults)]
    print(f"\n{num_faults} faults, seed {seed}")
    history: list[tuple[str, float]] = []
    while faults:
        tmp_path = tmp_path_factory.mktemp("chaos")
        disturbed = DisturbedRun(tmp_path, num_faults, chance)
        for fault in list(faults[:FAULTS_PER_RUN]):
            disturbed.strike(fault)
            if disturbed.is_over:
                break
            faults.remove(fault)
        check(disturbed, *undisturbed)
        history += disturbed.history
        assert disturbed.history, "the run was over before anything could happen to it"
    print_table(history)


def check(disturbed: DisturbedRun, draft: dict[str, str], losses: list[float]) -> None:
    """The run is finished, its accounts add up, it is the undisturbed one, and all is clean."""
    summary = disturbed.driver.summary()
    num_samples = NUM_PROMPTS * disturbed.run.training.num_epochs
    assert (summary["num_trained"], summary["num_rejected"]) == (num_samples, 0)
    steps = disturbed.folder.read_metrics()
    assert [step.step for step in steps] == list(range(1, len(losses) + 1))
    assert [step.loss for step in steps] == losses
    assert draft_digest(disturbed.folder) == draft
    disturbed.driver.wait_until_gone(30)


def print_table(history: list[tuple[str, float]]) -> None:
    print(f"\n{len(history)} faults survived; seconds until a step never taken before:")
    for name in dict.fromkeys(name for name, _ in history):
        seconds = [s for other, s in history if other == name]
        mean = sum(seconds) / len(seconds)
        print(
            f"  {name:32} {len(seconds):3} times, {mean:5.1f} on average, {max(seconds):5.1f} most"
        )
