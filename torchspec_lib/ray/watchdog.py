"""Tells a run that hangs from one that is slow."""

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from torchspec_lib.errors import HungError
from torchspec_lib.ray.failures import unwrap
from torchspec_lib.types import Pulse

LONGEST_INTERVAL_S = 5.0


class Watchdog:
    """Asks actors for a sign of life. They hang if one doesn't answer, or if none gets anywhere."""

    def __init__(self, parts: Mapping[str, Any], timeout_s: float) -> None:
        """Watch ``parts``, actors with a method ``pulse``, by the names that errors shall use.

        ``timeout_s`` is how long an answer or progress may take. ``check`` has to be called
        every ``interval_s``.
        """
        self._parts, self._timeout_s = parts, timeout_s
        self.interval_s = min(LONGEST_INTERVAL_S, timeout_s / 4)
        self._asked: dict[str, tuple[float, Any]] = {}
        self._pulses: dict[str, Pulse] = {}
        self._progress: tuple[int, ...] = ()
        self._quiet_s = 0.0
        self._checked = time.monotonic()

    def check(self) -> None:
        """Take answers, ask again.

        Raises:
            HungError: A part doesn't answer, or nothing has moved.
            WorkerLostError: A part died.
        """
        now = time.monotonic()
        # If this process itself was stopped for a while, nobody else is to blame.
        elapsed_s = min(now - self._checked, 2 * self.interval_s)
        self._checked = now
        for name, actor in self._parts.items():
            self._ask(name, actor, now)
        progress = tuple(pulse.progress for pulse in self._pulses.values())
        self._quiet_s = 0.0 if progress != self._progress else self._quiet_s + elapsed_s
        self._progress = progress
        if self._quiet_s > self._timeout_s + 2 * self.interval_s:
            doing = [line for pulse in self._pulses.values() for line in pulse.doing]
            words = f"nothing has moved for {self._quiet_s:.0f} s: {'; '.join(doing)}"
            raise HungError("a part of the run", words)

    def _ask(self, name: str, actor: Any, now: float) -> None:
        since, ref = self._asked.pop(name, (now, None))
        if ref is not None:
            done, _ = ray.wait([ref], timeout=0)
            if done:
                try:
                    self._pulses[name] = ray.get(ref)
                except RayError as error:
                    raise unwrap(error, name) from error
                since, ref = now, None
            elif now - since > self._timeout_s:
                raise HungError(name, f"no answer for {now - since:.0f} s")
        self._asked[name] = (since, ref or actor.pulse.remote())


def wait_for(call: Any, watchdog: Watchdog) -> None:
    """Wait for the end of a call, for as long as those who work on it get anywhere.

    Raises:
        HungError: They don't.
        WorkerLostError: One of them died.
    """
    while not ray.wait([call], timeout=watchdog.interval_s)[0]:
        watchdog.check()
