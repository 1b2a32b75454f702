"""Keeps the engines busy within a budget of bytes, and sees every prompt through.

Who waits for whom: ``_feed`` waits for bytes, which ``release`` gives back; an engine's
workers wait for requests, which ``_feed`` and failed attempts bring; ``recapture`` waits for
one sample. The budget is granted in the order of the prompts, and steps take samples in
that order too: so the oldest prompt always has its bytes, and nothing can block for ever.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torchspec_lib.errors import EngineError, WorkerLostError
from torchspec_lib.types import (
    CaptureFailure,
    CaptureRequest,
    CaptureResult,
    SampleKey,
    SampleRef,
)

logger = logging.getLogger(__name__)

WORKERS_PER_ENGINE = 2
"""Calls that an engine has at a time: while it works on one, the next is already there."""


class Engine(Protocol):
    """An engine as the manager calls it; a dead one raises ``WorkerLostError``."""

    async def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]: ...

    async def discard(self, keys: Sequence[SampleKey]) -> None: ...


class Controller(Protocol):
    """What the manager asks of the training controller."""

    async def take(self, max_prompts: int) -> list[CaptureRequest]: ...

    async def deliver(self, results: Sequence[CaptureResult]) -> None: ...


@dataclass(frozen=True, slots=True)
class CapturePolicy:
    """Limits of capturing."""

    max_in_flight_bytes: int
    request_size: int
    """Prompts that an engine gets at a time."""
    max_attempts: int


@dataclass(frozen=True, slots=True)
class CaptureStats:
    """What was captured so far, and how long capturing stood still for want of bytes."""

    num_samples: int
    num_bytes: int
    waited_for_bytes_s: float


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


class InferenceManager:
    """Each prompt it takes ends in one delivered result, however many attempts that needs."""

    def __init__(
        self,
        controller: Controller,
        engines: Sequence[Engine],
        policy: CapturePolicy,
        reserved_bytes: Callable[[int], int],
    ) -> None:
        """``reserved_bytes`` gives a sample's size at most, from its number of tokens."""
        self._controller, self._engines = controller, list(engines)
        self._policy, self._reserved_bytes = policy, reserved_bytes
        self._budget = ByteBudget(policy.max_in_flight_bytes)
        self._alive = set(range(len(engines)))
        self._queue: deque[tuple[CaptureRequest, int | None]] = deque()
        """Requests, and the engine that shall not get them again."""
        self._queued = asyncio.Condition()
        self._held: dict[SampleKey, CaptureRequest] = {}
        """Every attempt that holds bytes: queued, being captured, or captured and unread."""
        self._recaptures: dict[tuple[int, str], asyncio.Future[CaptureResult]] = {}
        self._num_samples = self._num_bytes = 0

    async def run(self) -> None:
        """Capture until cancelled.

        Raises:
            WorkerLostError: The last engine died.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._feed())
                for index in range(len(self._engines)):
                    for _ in range(WORKERS_PER_ENGINE):
                        tasks.create_task(self._work(index))
        except ExceptionGroup as group:  # the first cause, as itself
            raise group.exceptions[0] from group

    async def _feed(self) -> None:
        batch = self._policy.request_size * len(self._engines)
        while requests := await self._controller.take(batch):
            for request in requests:
                await self._budget.acquire(self._reserved_bytes(request.prompt.num_tokens))
                self._held[request.key] = request
                await self._enqueue([request])

    async def _enqueue(self, requests: Sequence[CaptureRequest]) -> None:
        async with self._queued:
            self._queue.extend((request, None) for request in requests)
            self._queued.notify_all()

    async def _requeue(self, requests: Sequence[CaptureRequest], avoid: int | None) -> None:
        """Put repeated attempts first: the oldest prompts are what a step waits for."""
        async with self._queued:
            self._queue.extendleft((request, avoid) for request in reversed(requests))
            self._queued.notify_all()

    # One engine's work

    async def _work(self, index: int) -> None:
        engine = self._engines[index]
        while True:
            async with self._queued:
                await self._queued.wait_for(lambda: index not in self._alive or self._is_due(index))
                if index not in self._alive:
                    return
                requests = self._pop(index)
            try:
                results = await engine.capture(requests)
            except (WorkerLostError, EngineError) as error:
                await self._lose(index, requests, error)
                return
            await self._settle(index, results)

    def _is_due(self, index: int) -> bool:
        return any(self._may_have(index, avoid) for _, avoid in self._queue)

    def _may_have(self, index: int, avoid: int | None) -> bool:
        return avoid != index or self._alive == {index}

    def _pop(self, index: int) -> list[CaptureRequest]:
        taken: list[CaptureRequest] = []
        kept: list[tuple[CaptureRequest, int | None]] = []
        while self._queue and len(taken) < self._policy.request_size:
            request, avoid = self._queue.popleft()
            if self._may_have(index, avoid):
                taken.append(request)
            else:
                kept.append((request, avoid))
        self._queue.extendleft(reversed(kept))
        return taken

    async def _settle(self, index: int, results: Sequence[CaptureResult]) -> None:
        final: list[CaptureResult] = []
        again: list[CaptureRequest] = []
        for result in results:
            if isinstance(result, SampleRef):
                self._num_samples += 1
                self._num_bytes += result.num_bytes
                final.append(result)
            elif result.retryable and result.key.attempt < self._policy.max_attempts:
                logger.warning("event=retry sample=%s reason=%s", result.key, result.reason)
                again.append(self._next_attempt(result.key))
            else:
                logger.warning("event=reject sample=%s reason=%s", result.key, result.reason)
                await self._give_back([result.key])
                final.append(result)
        await self._requeue(again, avoid=index)
        await self._conclude(final)

    def _next_attempt(self, key: SampleKey) -> CaptureRequest:
        """The same prompt under a new key; the bytes stay reserved."""
        request = CaptureRequest(key.next_attempt(), self._held.pop(key).prompt)
        self._held[request.key] = request
        return request

    async def _conclude(self, results: Sequence[CaptureResult]) -> None:
        """Hand results on: to the rank that asked for a lost sample, or to the controller."""
        first_time: list[CaptureResult] = []
        for result in results:
            asked = self._recaptures.pop((result.key.epoch, result.key.prompt_id), None)
            if asked is None:
                first_time.append(result)
            elif not asked.done():
                asked.set_result(result)
        if first_time:
            await self._controller.deliver(first_time)

    async def _lose(
        self, index: int, requests: Sequence[CaptureRequest], error: WorkerLostError | EngineError
    ) -> None:
        """An engine died: its prompts go to others, its half-made samples are freed."""
        self._alive.discard(index)
        logger.error("event=engine_lost engine=%d error=%s", index, error)
        if not self._alive:
            raise WorkerLostError("the last engine", str(error))
        again: list[CaptureRequest] = []
        failed: list[CaptureResult] = []
        for request in requests:
            if request.key.attempt < self._policy.max_attempts:
                again.append(self._next_attempt(request.key))
            else:
                await self._give_back([request.key])
                failed.append(CaptureFailure(request.key, "its engines died", retryable=False))
        await self._engines[min(self._alive)].discard([request.key for request in requests])
        await self._requeue(again, avoid=index)
        await self._conclude(failed)

    # Towards the trainers

    async def release(self, keys: Sequence[SampleKey]) -> None:
        """Samples were read and freed: their bytes may be used again."""
        await self._give_back(keys)

    async def _give_back(self, keys: Sequence[SampleKey]) -> None:
        held = [self._held.pop(key) for key in keys]
        await self._budget.release(
            sum(self._reserved_bytes(request.prompt.num_tokens) for request in held)
        )

    async def recapture(self, ref: SampleRef) -> CaptureResult:
        """Capture a lost sample again, under a new key and the bytes it already has."""
        asked: asyncio.Future[CaptureResult] = asyncio.get_running_loop().create_future()
        self._recaptures[ref.key.epoch, ref.key.prompt_id] = asked
        request = self._next_attempt(ref.key)
        if request.key.attempt > self._policy.max_attempts:
            await self._give_back([request.key])
            del self._recaptures[ref.key.epoch, ref.key.prompt_id]
            return CaptureFailure(request.key, "lost from the store too often", retryable=False)
        await self._requeue([request], avoid=None)
        return await asked

    # Towards the driver

    async def stats(self) -> CaptureStats:
        return CaptureStats(self._num_samples, self._num_bytes, self._budget.waited_s)
