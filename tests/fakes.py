"""Fakes behind the protocols that the real things pass too."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from torchspec_lib.errors import WorkerLostError
from torchspec_lib.types import (
    CaptureFailure,
    CaptureRequest,
    CaptureResult,
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
    """Captures in no time, or as ``behave`` says for a request."""

    def __init__(
        self, behave: Callable[[CaptureRequest], CaptureResult] = sample, dies_after: int = 10**9
    ) -> None:
        self.behave, self.dies_after = behave, dies_after
        self.captured: list[SampleKey] = []
        self.discarded: list[SampleKey] = []

    async def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        await asyncio.sleep(0)
        self.captured += [request.key for request in requests]
        if len(self.captured) > self.dies_after:
            raise WorkerLostError("engine", "killed")
        return [self.behave(request) for request in requests]

    async def discard(self, keys: Sequence[SampleKey]) -> None:
        self.discarded += keys


def failing(prompt_ids: set[str], retryable: bool) -> Callable[[CaptureRequest], CaptureResult]:
    def behave(request: CaptureRequest) -> CaptureResult:
        if request.prompt.prompt_id in prompt_ids:
            return CaptureFailure(request.key, "poison", retryable)
        return sample(request)

    return behave
