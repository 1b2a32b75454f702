"""Limits of capturing: flow control in bytes, and how often what fails is tried again."""

import asyncio
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CapturePolicy:
    """Limits of capturing."""

    max_in_flight_bytes: int
    request_size: int
    """Prompts that an engine gets at a time."""
    max_attempts: int
    max_restarts: int
    """Of an engine, without a sample in between."""
    hang_timeout_s: float
    """For a call: an engine that takes longer counts as dead."""


class ByteBudget:
    """Bytes that may be in flight, granted first come, first served."""

    def __init__(self, num_bytes: int) -> None:
        self._free = self.num_bytes = num_bytes
        self._freed = asyncio.Condition()
        self.waited_s = 0.0

    @property
    def in_flight(self) -> int:
        return self.num_bytes - self._free

    async def acquire(self, num_bytes: int) -> None:
        """Wait until ``num_bytes`` are free, and take them. One caller at a time."""
        start = time.monotonic()
        async with self._freed:
            await self._freed.wait_for(lambda: self._free >= num_bytes)
            self._free -= num_bytes
        self.waited_s += time.monotonic() - start

    async def release(self, num_bytes: int) -> None:
        async with self._freed:
            self._free += num_bytes
            self._freed.notify_all()
