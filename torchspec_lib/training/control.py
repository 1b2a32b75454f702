"""What a trainer rank asks of the control plane. Metadata only; every call blocks."""

from collections.abc import Sequence
from typing import Protocol

from torchspec_lib.types import (
    Accounts,
    CaptureResult,
    MicroBatch,
    SampleKey,
    SampleRef,
    StepReport,
)


class TrainingControl(Protocol):
    """The controller and the manager, as a rank's main and prefetch threads see them.

    A step's composition is the controller's to decide: a rank never drops a sample on its
    own, since its peers would wait for it in a collective.
    """

    def next_step(self, rank: int, step: int) -> tuple[MicroBatch, ...] | None:
        """This rank's micro-batches of ``step``, once its samples are captured.

        Every rank gets equally many, possibly empty ones; None when the run is over.
        """
        ...

    def fetched(self, keys: Sequence[SampleKey]) -> None:
        """Samples were copied out and freed: their bytes may be used again."""
        ...

    def recapture(self, ref: SampleRef) -> CaptureResult:
        """Capture a lost sample again; a failure is final and rejects the prompt."""
        ...

    def report(self, report: StepReport) -> None:
        """This rank has finished a step."""
        ...

    def accounts(self, step: int) -> Accounts:
        """The accounts after ``step``, once every rank has reported it."""
        ...

    def beat(self, rank: int, doing: str) -> None:
        """This rank is alive, and doing that."""
        ...
