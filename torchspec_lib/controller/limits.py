"""Limits of capturing: flow control in bytes and tokens, and how often a failure is retried."""

import asyncio
import time
from dataclasses import dataclass
from typing import Self

from torchspec_lib.config.run import RunConfig

WINDOW_FORWARDS = 4
"""Of SGLang's: as many as its own window has, and one for which the prompts are already there."""


@dataclass(frozen=True, slots=True)
class CapturePolicy:
    """Limits of capturing."""

    max_in_flight_bytes: int
    call_prompts: int
    """Prompts of a call at most."""
    num_calls: int
    """Calls that an engine has at a time."""
    window_tokens: int
    """An engine with as many gets no more. A call has its share of them, or one longer prompt."""
    max_attempts: int
    max_restarts: int
    """Of an engine, without a sample in between."""
    hang_timeout_s: float
    """Without an answer: an engine that takes longer counts as dead."""

    @property
    def call_tokens(self) -> int:
        """Tokens of a call at most, unless it is one prompt."""
        return self.window_tokens // self.num_calls

    @classmethod
    def of(cls, run: RunConfig, max_in_flight_bytes: int) -> Self:
        """A run's limits: windows that neither leave a gap between calls nor hold results back."""
        inference, num_calls = run.inference, run.inference.num_calls
        if inference.engine == "sglang":
            window_tokens = WINDOW_FORWARDS * inference.sglang.prefill_tokens
        else:
            window_tokens = num_calls * run.data.max_length
        return cls(
            max_in_flight_bytes=max_in_flight_bytes,
            # However many calls they are split into, it has as many prompts at a time.
            call_prompts=max(1, 2 * inference.request_size // num_calls),
            num_calls=num_calls,
            window_tokens=window_tokens,
            max_attempts=inference.max_attempts,
            max_restarts=run.recovery.max_restarts,
            hang_timeout_s=run.recovery.hang_timeout_s,
        )


class ByteBudget:
    """Bytes that may be in flight. One caller may wait for them at a time."""

    def __init__(self, num_bytes: int) -> None:
        self._free = self.num_bytes = num_bytes
        self._freed = asyncio.Event()
        self.waited_s = 0.0

    @property
    def in_flight(self) -> int:
        return self.num_bytes - self._free

    async def acquire(self, num_bytes: int) -> None:
        """Wait until ``num_bytes`` are free, and take them."""
        start = time.monotonic()
        while self._free < num_bytes:
            self._freed.clear()
            await self._freed.wait()
        self._free -= num_bytes
        self.waited_s += time.monotonic() - start

    def release(self, num_bytes: int) -> None:
        self._free += num_bytes
        self._freed.set()
