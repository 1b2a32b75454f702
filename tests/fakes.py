"""Fakes behind the protocols that the real things pass too."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from torchspec_lib.errors import WorkerLostError
from torchspec_lib.types import (
    CaptureFailure,
    CaptureRequest,
    CaptureResult,
    Fault,
    Prompt,
    SampleKey,
    SampleRef,
)

BYTES_PER_TOKEN = 10


def make_prompts(num: int, num_tokens: Callable[[int], int] = lambda i: 4) -> list[Prompt]:
    return [
        Prompt(f"p{i}", np.arange(num_tokens(i), dtype=np.int32), np.ones(num_tokens(i), np.bool_))
        for i in range(num)
    ]


def sample(request: CaptureRequest) -> SampleRef:
    num_tokens = request.prompt.num_tokens
    return SampleRef(request.key, num_tokens * BYTES_PER_TOKEN, num_tokens, {})


class FakeEngine:
    """Captures in no time, or as ``behave`` says for a request; may die or hang on one."""

    def __init__(
        self,
        behave: Callable[[CaptureRequest], CaptureResult] = sample,
        dies_at: Sequence[int] = (),
        kills: Sequence[str] = (),
        hangs_at: Sequence[int] = (),
        startable: bool = True,
    ) -> None:
        """Die or hang at these calls, counted from 1; die of these prompts."""
        self.behave, self.startable = behave, startable
        self.dies_at, self.kills, self.hangs_at = set(dies_at), set(kills), set(hangs_at)
        self.captured: list[SampleKey] = []
        self.discarded: list[SampleKey] = []
        self.starts: list[bool] = []
        """Whether it was killed before, for each."""
        self.num_calls = 0
        self._is_dead = False

    async def start(self, kill: bool) -> None:
        if not self.startable:
            raise WorkerLostError("engine", "its node is gone")
        await asyncio.sleep(0)
        self.starts.append(kill)
        self._is_dead = False

    async def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        await asyncio.sleep(0)
        self.num_calls += 1
        self.captured += [request.key for request in requests]
        if self.num_calls in self.hangs_at:
            await asyncio.sleep(3600)
        ends_it = self.num_calls in self.dies_at or self.kills & {
            request.prompt.prompt_id for request in requests
        }
        if ends_it or self._is_dead:
            self._is_dead = True
            raise WorkerLostError("engine", "killed")
        return [self.behave(request) for request in requests]

    async def discard(self, keys: Sequence[SampleKey]) -> None:
        self.discarded += keys


def failing(prompt_ids: set[str], fault: Fault) -> Callable[[CaptureRequest], CaptureResult]:
    def behave(request: CaptureRequest) -> CaptureResult:
        if request.prompt.prompt_id in prompt_ids:
            return CaptureFailure(request.key, "poison", fault)
        return sample(request)

    return behave
