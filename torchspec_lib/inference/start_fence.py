"""Keeps what one start of a run's trainers asked for away from the next."""

from torchspec_lib.errors import EngineError
from torchspec_lib.transfer.store import TensorStore
from torchspec_lib.types import start_id


class StartFence:
    """Lets calls for the latest start through. An engine has one, and asks it first.

    When trainers are started again, calls for the start before may still be in an engine's queue,
    and samples of it in the store, which nobody will read.
    """

    def __init__(self, store: TensorStore, run_id: str) -> None:
        self._store, self._run_id, self._start = store, run_id, 0

    def enter(self, start: int) -> None:
        """Begin a call for the ``start``-th start; a new one frees what the one before left.

        Raises:
            EngineError: The engine works for a later start already.
            StoreUnavailableError: Nothing could be freed.
        """
        if start < self._start:
            raise EngineError(self._run_id, f"works for start {self._start} and not for {start}")
        if start > self._start:
            self._store.clear(start_id(self._run_id, start - 1))
            self._start = start
