"""The loop that every training algorithm shares."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.control import TrainingControl
from torchspec_lib.training.prefetch import PreparedStep
from torchspec_lib.training.snapshots import SaveDraft, SnapshotWriter
from torchspec_lib.training.state import TrainingState
from torchspec_lib.types import StepMetrics, StepReport

logger = logging.getLogger(__name__)

Measure = Callable[[], StepMetrics]
"""Waits for the end of a step that was started, and gives its figures; called once."""


class Trainer(ABC):
    """Takes prepared steps one by one: trains, reports, saves a checkpoint where one is due.

    All ranks go through the same steps. An algorithm is a subclass with ``train_step`` and
    ``copy_draft``.
    """

    def __init__(self, state: TrainingState, checkpoints: CheckpointFolder) -> None:
        self._state, self._checkpoints = state, checkpoints
        self._rank = dist.get_rank()
        self._step = 0
        self._doing = "starting"

    @property
    def doing(self) -> str:
        """What this rank is at, in a few words, for who looks on."""
        saving = self._checkpoints.doing
        return f"{self._doing}; {saving}" if saving else self._doing

    @property
    def step(self) -> int:
        """The last step taken; 0 before the first."""
        return self._step

    @abstractmethod
    def train_step(self, prepared: PreparedStep) -> Measure:
        """Start one optimizer step. A collective: all ranks take the same one.

        Returns:
            What waits for its end and gives its figures.
        """

    @abstractmethod
    def copy_draft(self) -> SaveDraft:
        """Copy the draft as it is now, as engines serve it. A collective.

        Returns:
            What writes the copy on rank 0, and needs no other rank.
        """

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: It can't be loaded.
        """
        self._step = self._checkpoints.load(path, self._state)
        logger.info("event=resumed step=%d checkpoint=%s", self._step, path)

    def run(
        self,
        steps: Iterable[PreparedStep],
        control: TrainingControl,
        snapshots: SnapshotWriter | None = None,
    ) -> int:
        """Train to the end of ``steps``; what was trained last is saved in any case.

        A step is reported while the next one is under way, so that a GPU waits for neither the
        report nor for being asked how the step went. It is saved once it is reported.

        Returns:
            The last step taken.

        Raises:
            CheckpointError: The last step can't be saved.
        """
        self._doing = f"waiting for step {self._step + 1}"
        with ThreadPoolExecutor(1, "report") as thread:
            reported: Future[None] | None = None
            for prepared in steps:
                self._doing = f"training step {prepared.step}"
                measure = self.train_step(prepared)
                self._wait_for(reported)
                self._step = prepared.step
                reported = thread.submit(self._report, prepared, measure, control)
                if self._checkpoints.is_due(self._step):
                    self._wait_for(reported)
                    self._doing = f"saving step {self._step}"
                    self._checkpoints.save(self._state, self._step, control.accounts)
                if snapshots is not None and snapshots.is_due(self._step):
                    self._doing = f"copying the draft of step {self._step}"
                    snapshots.write(self._step, self.copy_draft())
                self._doing = f"waiting for step {self._step + 1}"
            self._wait_for(reported)
        self._doing = f"saving step {self._step}, the last"
        self._checkpoints.finish(self._state, self._step, control.accounts)
        if snapshots is not None:
            snapshots.wait()
        self._doing = "done"
        return self._step

    def _wait_for(self, reported: Future[None] | None) -> None:
        """Until the step that was started last is reported; raises what went wrong in it."""
        if reported is not None:
            self._doing = f"reporting step {self._step}"
            reported.result()

    def _report(self, prepared: PreparedStep, measure: Measure, control: TrainingControl) -> None:
        metrics = measure()
        control.report(
            StepReport(
                step=prepared.step,
                rank=self._rank,
                trained=prepared.trained,
                rejected=prepared.rejected,
                metrics=metrics if self._rank == 0 else None,
            )
        )
