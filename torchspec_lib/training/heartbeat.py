"""Tells the control plane that a rank is alive, and what it is at."""

import threading
from collections.abc import Callable
from typing import Self

from torchspec_lib.errors import WorkerLostError
from torchspec_lib.training.control import TrainingControl

_JOIN_TIMEOUT_S = 1.0


class Heartbeat:
    """Beats at once and then every few seconds, in a thread, for as long as it is entered.

    A control plane that is lost ends it quietly: the training finds out by itself.
    """

    def __init__(
        self, control: TrainingControl, rank: int, interval_s: float, doing: Callable[[], str]
    ) -> None:
        """``doing`` is called from the thread."""
        self._control, self._rank = control, rank
        self._interval_s, self._doing = interval_s, doing
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the thread. One that waits for the control plane ends with its process."""
        self._over.set()
        self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._control.beat(self._rank, self._doing())
            except WorkerLostError:
                return
            self._over.wait(self._interval_s)
