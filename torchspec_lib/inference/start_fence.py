"""Keeps what one start of a run's trainers asked for away from the next."""

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torchspec_lib.errors import EngineError
from torchspec_lib.transfer.store import TensorStore
from torchspec_lib.types import SampleKey, start_id


class StartFence:
    """Lets calls for the latest start through. An engine has one, and captures within it.

    When trainers are started again, calls for the start before may still be in an engine's queue,
    and samples of it in the store, which nobody will read. Several threads may use it at once.
    """

    def __init__(self, store: TensorStore, run_id: str) -> None:
        self._store, self._run_id, self._start = store, run_id, 0
        self._under_way: set[SampleKey] = set()
        self._changed = threading.Condition()

    @contextmanager
    def capturing(self, start: int, keys: Collection[SampleKey]) -> Iterator[None]:
        """Capture ``keys`` for the ``start``-th start.

        A new one waits for the calls of those before, and frees what they left.

        Raises:
            EngineError: The engine works for a later start already.
            StoreUnavailableError: Nothing could be freed.
        """
        with self._changed:
            self._enter(start)
            self._under_way.update(keys)
        try:
            yield
        finally:
            with self._changed:
                self._under_way.difference_update(keys)
                self._changed.notify_all()

    def _enter(self, start: int) -> None:
        self._changed.wait_for(lambda: start <= self._start or not self._under_way)
        if start < self._start:
            raise EngineError(self._run_id, f"works for start {self._start} and not for {start}")
        if start > self._start:
            for earlier in range(self._start, start):  # an engine needn't have heard of all
                self._store.clear(start_id(self._run_id, earlier))
            self._start = start

    def wait_for(self, keys: Collection[SampleKey]) -> None:
        """Wait until none of ``keys`` is being captured."""
        with self._changed:
            self._changed.wait_for(lambda: self._under_way.isdisjoint(keys))
