"""Which draft of a training is exported: the best of its snapshots by real decoding.

Trainers leave snapshots in the run's folder, the decoder takes them one by one. Who waits for
whom: nobody for the decoder, until the training is over. While it is busy the newest snapshot
waits, and takes the place of the one that waited before.

Results stay in the run's folder, and so does the best snapshot: a run that goes on from a
checkpoint knows what it had found, and decodes no step twice.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from torchspec_lib.config.training import SnapshotConfig
from torchspec_lib.errors import CheckpointError, TorchSpecError
from torchspec_lib.results import SnapshotResult
from torchspec_lib.run_folder import RunFolder

logger = logging.getLogger(__name__)


class Decoder(Protocol):
    """Decodes with one snapshot at a time."""

    def start(self, step: int) -> Any:
        """Begin with the snapshot of ``step``; gives what ``wait`` and ``result`` ask for."""
        ...

    def wait(self, call: Any) -> None:
        """Until it is through; raises a ``HungError`` if it gets nowhere."""
        ...

    def result(self, call: Any) -> SnapshotResult:
        """What it found; raises what kept it from decoding."""
        ...


def best(results: Sequence[SnapshotResult]) -> SnapshotResult | None:
    """The one with the longest accept length, of equal ones the latest; None of none."""
    return max(results, key=lambda result: (result.accept_length, result.step), default=None)


def num_without_gain(results: Sequence[SnapshotResult]) -> int:
    """How many came after the longest accept length was first reached.

    ``results`` are in the order of their steps.
    """
    lengths = [result.accept_length for result in results]
    return len(lengths) - 1 - lengths.index(max(lengths)) if lengths else 0


class SnapshotSelection:
    """Keeps the decoder at work, and says which snapshot is the best. The driver's."""

    def __init__(
        self, folder: RunFolder, settings: SnapshotConfig, decoder: Decoder | None
    ) -> None:
        """Go on with what is in ``folder``; ``decoder`` is None where there are no snapshots.

        Raises:
            CheckpointError: The best snapshot of the run isn't there any more.
        """
        self._folder, self._settings, self._decoder = folder, settings, decoder
        self._results = sorted(folder.read_snapshots(), key=lambda result: result.step)
        self._decoding: tuple[int, Any] | None = None
        self.problem: str | None = None
        """Why nothing is decoded any more."""
        found = self.best
        if found is not None and not folder.snapshot(found.step).is_dir():
            raise CheckpointError(
                str(folder.snapshot(found.step)),
                "the run's best snapshot isn't there any more",
                "Put it back, or set fresh: true to start over",
            )

    @property
    def best(self) -> SnapshotResult | None:
        return best(self._results)

    @property
    def results(self) -> tuple[SnapshotResult, ...]:
        return tuple(self._results)

    @property
    def calls(self) -> list[Any]:
        """What the decoder is at: ``take`` it when it is through."""
        return [] if self._decoding is None else [self._decoding[1]]

    def restart(self, step: int) -> None:
        """The training goes on from ``step``: what it left since is made again."""
        for path in self._folder.snapshots.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)  # half written
        for later in self._waiting():
            if later > step and later != self._busy_with:
                shutil.rmtree(self._folder.snapshot(later))

    def advance(self) -> None:
        """Hand the newest snapshot to the decoder, if it is idle; older ones are left out."""
        waiting = [step for step in self._waiting() if step != self._busy_with]
        for step in waiting[:-1]:
            logger.warning("event=snapshot_left_out step=%d newer=%d", step, waiting[-1])
            shutil.rmtree(self._folder.snapshot(step))
        if waiting and self._decoder is not None and self._decoding is None:
            self._decoding = waiting[-1], self._decoder.start(waiting[-1])

    @property
    def _busy_with(self) -> int | None:
        return None if self._decoding is None else self._decoding[0]

    def take(self) -> None:
        """Note what the decoder has found, and keep the best."""
        assert self._decoding is not None, "nothing is being decoded"
        assert self._decoder is not None, "by nobody"
        (step, call), self._decoding = self._decoding, None
        try:
            result = self._decoder.result(call)
        except TorchSpecError as error:
            self._give_up(error)
            return
        self._folder.append_snapshot(result)
        self._results = sorted([*self._results, result], key=lambda each: each.step)
        tqdm.write(f"  step {step}: accept length {result.accept_length:.3f}, decoded for real")
        self.advance()

    def is_over(self, step: int) -> bool:
        """Whether the training is to stop, now that it has come to ``step``.

        Not before it has come again to where it had been when it was interrupted: nothing is
        exported that hasn't been trained.
        """
        patience, results = self._settings.patience, self._results
        if patience is None or not results or step < results[-1].step:
            return False
        return num_without_gain(results) >= patience

    def finish(self) -> None:
        """Wait until the newest snapshot is decoded."""
        self.advance()
        while self._decoding is not None:
            assert self._decoder is not None, "by nobody"
            try:
                self._decoder.wait(self._decoding[1])
            except TorchSpecError as error:
                self._decoding = None
                self._give_up(error)
            else:
                self.take()

    def export(self, step: int) -> int:
        """Make the best snapshot the run's draft, or that of ``step`` if none was decoded.

        Returns:
            Its step.
        """
        found = self.best
        chosen = step if found is None else found.step
        _replace(self._folder.snapshot(chosen), self._folder.draft)
        return chosen

    def _waiting(self) -> list[int]:
        """Steps whose snapshots are yet to be decoded. Removes what isn't needed any more."""
        decoded, found = {result.step for result in self._results}, self.best
        waiting = []
        for path in sorted(self._folder.snapshots.glob("step_*")):
            step = int(path.name.removeprefix("step_"))
            if step not in decoded:
                waiting.append(step)
            elif found is None or step != found.step:
                shutil.rmtree(path)
        return waiting

    def _give_up(self, error: Exception) -> None:
        """The training goes on; what is known decides what is exported."""
        self._decoder, self.problem = None, str(error)
        logger.warning("event=snapshots_given_up cause=%r", self.problem)
        tqdm.write(f"  no snapshot is decoded any more: {error}")


def _replace(source: Path, target: Path) -> None:
    """Copy a folder; ``target`` is the old one or the new one, whole, but for a moment none."""
    fresh = target.with_suffix(".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    if target.exists():
        shutil.rmtree(target)
    fresh.rename(target)
