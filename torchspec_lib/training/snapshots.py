"""The draft as it is amidst the training, left in a folder for whoever decodes with it."""

import logging
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from torchspec_lib.run_folder import RunFolder

logger = logging.getLogger(__name__)

SaveDraft = Callable[[Path], None]
"""Writes a copy of the draft to a folder, which appears whole or not at all."""


class SnapshotWriter:
    """Writes a snapshot every few steps in a thread of its own, while the training goes on.

    Who waits for whom: a snapshot that is due waits for the one before to be written.
    """

    def __init__(self, folder: RunFolder, interval: int, decoded: Collection[int]) -> None:
        """Write to ``folder``, every ``interval`` steps but for those ``decoded`` already."""
        self._folder, self._interval, self._decoded = folder, interval, frozenset(decoded)
        self._thread = ThreadPoolExecutor(1, "snapshot")
        self._writing: Future[None] | None = None

    def is_due(self, step: int) -> bool:
        """The same on every rank."""
        return step % self._interval == 0 and step not in self._decoded

    def write(self, step: int, save: SaveDraft) -> None:
        """Begin to write; raises what kept the one before from being written."""
        self.wait()
        self._writing = self._thread.submit(_write, save, self._folder.snapshot(step))

    def wait(self) -> None:
        """Until what was begun is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _write(save: SaveDraft, path: Path) -> None:
    """A disk that is full costs a snapshot, not the training."""
    try:
        save(path)
    except (OSError, SafetensorError) as error:
        logger.warning("event=no_snapshot path=%s cause=%r", path, str(error))
