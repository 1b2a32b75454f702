"""Brings a program back that ended by itself or hangs, until that is no use any more."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from torchspec_lib.errors import StoreUnavailableError
from torchspec_lib.transfer.mooncake.managed_process import ManagedProcess
from torchspec_lib.types import Recovery

logger = logging.getLogger(__name__)

_PROBE_INTERVAL_S = 2.0
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Patience:
    """When a program is restarted, and when that is no use any more."""

    max_restarts: int
    """In a row, which ends once the program has been up for ``steady_s``."""
    hang_timeout_s: float
    """After so long a silence it is killed."""
    pause_s: float
    """From its end to the restart."""
    steady_s: float = 60.0


class Watch:
    """Restarts ``process`` as it was, after the end of it or a silence, until it is stopped.

    ``ended`` gets a result when the process was stopped, and a ``StoreUnavailableError`` when
    it was given up.
    """

    def __init__(
        self,
        process: ManagedProcess,
        part: str,
        is_up: Callable[[], bool],
        is_silent: Callable[[], bool],
        patience: Patience,
    ) -> None:
        """Starts to watch.

        Args:
            process: Up at the moment.
            part: Its name in recoveries and errors, such as ``mooncake_client on 10.0.0.7``.
            is_up: Whether a restarted one is ready.
            is_silent: Whether it doesn't answer although it should.
            patience: How long, and how often.
        """
        self._process, self._part = process, part
        self._is_up, self._is_silent = is_up, is_silent
        self._patience, self._num_restarts = patience, 0
        self._recoveries: list[Recovery] = []
        self.ended: Future[None] = Future()
        threading.Thread(target=self._run, name=f"watch-{process.name}", daemon=True).start()

    def recoveries(self) -> list[Recovery]:
        """Every time that it came back, oldest first."""
        return list(self._recoveries)

    def _run(self) -> None:
        try:
            self._keep_up()
        except (StoreUnavailableError, OSError) as error:
            logger.error("event=given_up part=%r cause=%r", self._part, str(error))  # noqa: TRY400
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def _keep_up(self) -> None:
        while True:
            up_since = time.monotonic()
            cause, up_until = self._wait_for_fault()
            noticed_at = time.monotonic()
            if up_until - up_since >= self._patience.steady_s:
                self._num_restarts = 0
            if self._process.is_stopping or not self._bring_back(cause):
                return
            seconds = time.monotonic() - noticed_at
            self._recoveries.append(Recovery(self._part, cause, seconds))
            logger.warning("event=recovered part=%r seconds=%.1f", self._part, seconds)

    def _wait_for_fault(self) -> tuple[str, float]:
        """Blocks until it has ended, or was killed since it hung; how that was, and since when."""
        silent_since: float | None = None
        while not self._process.wait_for_end(_PROBE_INTERVAL_S):
            asked_at = time.monotonic()
            if not self._is_silent():
                silent_since = None
            elif silent_since is None:
                # Its second failure ends it at the earliest: after a suspension of the machine,
                # or of this process, the first says nothing.
                silent_since = asked_at
            elif time.monotonic() - silent_since >= self._patience.hang_timeout_s:
                self._process.kill()
                return f"didn't answer for {time.monotonic() - silent_since:.0f} s", silent_since
        return self._process.ending(), time.monotonic()

    def _bring_back(self, cause: str) -> bool:
        """Whether it answers again; False if it was stopped meanwhile.

        Raises:
            StoreUnavailableError: It was restarted as often as it may be.
        """
        while self._num_restarts < self._patience.max_restarts:
            self._num_restarts += 1
            logger.warning(
                "event=restart part=%r number=%d cause=%r words=%r",
                self._part,
                self._num_restarts,
                cause,
                self._process.last_words(),
            )
            if not self._process.restart(self._patience.pause_s):
                return False
            if self._process.wait_until(self._is_up, _START_TIMEOUT_S):
                return True
            if self._process.is_stopping:
                return False
            hangs = self._process.is_running
            cause = f"wasn't up after {_START_TIMEOUT_S:.0f} s" if hangs else self._process.ending()
            self._process.kill()
        raise StoreUnavailableError(
            f"the watch of {self._part}",
            f"it {cause} after {self._num_restarts} restarts in a row. "
            f"{self._process.last_words()}",
        )
