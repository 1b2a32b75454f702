"""Keeps the engines busy within a budget of bytes, and sees every prompt through.

Who waits for whom: ``_feed`` waits for bytes, which ``release`` gives back; ``_dispatch`` waits
for jobs, which ``_feed`` and failed attempts bring, and for an engine that has room;
``recapture`` waits for one sample. The budget is granted in the order of the prompts, and
steps take samples in that order too: so the oldest prompt always has its bytes, and nothing
can block for ever. Every engine has a window of several small calls, and each call that comes
back makes room for another, whatever became of the rest. An engine that dies or hangs is
started again, and what it had goes to whoever is free.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torchspec_lib.controller.dispatch import next_calls
from torchspec_lib.controller.engine_slot import Call, Engine, EngineSlot
from torchspec_lib.controller.job_queue import Job, JobQueue
from torchspec_lib.controller.limits import ByteBudget, CapturePolicy
from torchspec_lib.errors import EngineError, GivenUpError, StoreUnavailableError, WorkerLostError
from torchspec_lib.types import (
    CaptureFailure,
    CaptureRequest,
    CaptureResult,
    Pulse,
    Recovery,
    SampleKey,
    SampleRef,
)

logger = logging.getLogger(__name__)

MAX_LOSSES = 10
"""Samples of one prompt that the store may lose before the prompt is rejected."""
STORE_PAUSE_S = 1.0
"""For an engine whose store is full or away: each attempt costs a forward."""


class Controller(Protocol):
    """What the manager asks of the training controller."""

    async def take(self, max_prompts: int) -> list[CaptureRequest]: ...

    async def deliver(self, results: Sequence[CaptureResult]) -> None: ...


@dataclass(frozen=True, slots=True)
class CaptureStats:
    """What was captured so far, and how long capturing stood still for want of bytes."""

    num_samples: int
    num_bytes: int
    waited_for_bytes_s: float


class InferenceManager:
    """Each prompt it takes ends in one delivered result, however many attempts that needs."""

    def __init__(
        self,
        controller: Controller,
        engines: Sequence[Engine],
        policy: CapturePolicy,
        reserved_bytes: Callable[[int], int],
        note: Callable[[Recovery], None] = lambda _: None,
    ) -> None:
        """Capture for ``controller`` on ``engines``.

        Args:
            controller: Where prompts come from and results go.
            engines: They may still be starting.
            policy: The limits.
            reserved_bytes: A sample's size at most, from its number of tokens.
            note: Gets every engine's recovery.
        """
        self._controller, self._policy, self._note = controller, policy, note
        self._slots = [EngineSlot(index, engine, policy) for index, engine in enumerate(engines)]
        self._reserved_bytes = reserved_bytes
        self._budget = ByteBudget(policy.max_in_flight_bytes)
        self._queue = JobQueue()
        self._changed = asyncio.Event()
        """A job came, or an engine has room."""
        self._held: dict[SampleKey, Job] = {}
        """Every attempt that holds bytes: queued, being captured, or captured and unread."""
        self._recaptures: dict[SampleKey, asyncio.Future[CaptureResult]] = {}
        """Who waits for a lost sample, by the key of its current attempt."""
        self._num_samples = self._num_bytes = self._progress = 0

    async def run(self) -> None:
        """Capture until cancelled.

        Raises:
            GivenUpError: Every engine died more often than it is restarted.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._feed())
                tasks.create_task(self._dispatch(tasks))
                for slot in self._slots:
                    tasks.create_task(self._start(slot, None))
        except ExceptionGroup as group:  # the first cause, as itself
            raise group.exceptions[0] from group

    async def _feed(self) -> None:
        policy = self._policy
        window = policy.num_calls * policy.call_prompts * len(self._slots)
        while requests := await self._controller.take(window):
            for request in requests:
                await self._budget.acquire(self._reserved_bytes(request.prompt.num_tokens))
                self._held[request.key] = job = Job(request)
                self._queue.append(job)
                self._changed.set()

    # One engine's work

    async def _dispatch(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            for slot, call in next_calls(self._slots, self._queue, self._policy):
                tasks.create_task(self._work(slot, call))

    async def _work(self, slot: EngineSlot, call: Call) -> None:
        try:
            results = await slot.finish(call)
        except StoreUnavailableError as error:
            self._try_again(call.jobs)
            self._pause(slot, str(error))
        except (WorkerLostError, EngineError) as error:
            await self._lose(slot, call, call.jobs, error)
        else:
            self._changed.set()
            await self._settle(slot, call.jobs, results)
        if (stuck := slot.stuck()) is not None:
            await self._lose(slot, call, [], stuck)

    async def _lose(
        self, slot: EngineSlot, call: Call, jobs: Sequence[Job], error: Exception
    ) -> None:
        """An engine didn't survive ``call`` and took ``jobs`` along: start it again."""
        is_first = slot.lose(call, error)
        await self._take_back(slot, jobs)
        if is_first:
            await self._start(slot, error)

    def _pause(self, slot: EngineSlot, cause: str) -> None:
        logger.warning("event=store_away engine=%d cause=%s", slot.index, cause)
        slot.num_pauses += 1
        asyncio.get_running_loop().call_later(STORE_PAUSE_S, self._resume, slot)

    def _resume(self, slot: EngineSlot) -> None:
        slot.num_pauses -= 1
        self._changed.set()

    async def _settle(
        self, slot: EngineSlot, jobs: Sequence[Job], results: Sequence[CaptureResult]
    ) -> None:
        final: list[CaptureResult] = []
        again: list[Job] = []
        trouble = ""
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, SampleRef):
                self._num_samples += 1
                self._num_bytes += result.num_bytes
                slot.num_restarts = 0
                job.avoid, job.is_suspect = None, False
                final.append(result)
            elif result.fault == "store":
                trouble = result.reason
                slot.garbage.append(result.key)
                again.append(job)
            else:
                job.num_failures += 1
                job.avoid = slot.index
                if result.fault == "prompt" or job.num_failures >= self._policy.max_attempts:
                    final.append(self._reject(job, result.reason))
                else:
                    logger.warning("event=retry sample=%s reason=%s", result.key, result.reason)
                    again.append(job)
        if trouble:
            self._pause(slot, trouble)
        self._try_again(again)
        await self._conclude(final)

    async def _take_back(self, slot: EngineSlot, jobs: Sequence[Job]) -> None:
        """An engine took ``jobs`` along; others get them. One that was alone is to blame."""
        again: list[Job] = []
        rejected: list[CaptureResult] = []
        slot.garbage += [job.request.key for job in jobs]
        for job in jobs:
            job.num_failures += job.is_suspect  # it was alone with this engine
            job.avoid, job.is_suspect = slot.index, True
            if job.num_failures >= self._policy.max_attempts:
                rejected.append(self._reject(job, "its engines died"))
            else:
                again.append(job)
        self._try_again(again)
        await self._conclude(rejected)

    def _try_again(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._renew(job)
        self._queue.put_back(jobs)
        self._changed.set()

    def _renew(self, job: Job) -> None:
        """The same prompt under a new key. The bytes stay reserved; who waits for it, waits on."""
        old = job.request.key
        job.request = CaptureRequest(old.next_attempt(), job.request.prompt)
        self._held[job.request.key] = self._held.pop(old)
        if old in self._recaptures:
            self._recaptures[job.request.key] = self._recaptures.pop(old)

    def _reject(self, job: Job, reason: str) -> CaptureFailure:
        logger.warning("event=reject sample=%s reason=%s", job.request.key, reason)
        self._free([job.request.key])
        return CaptureFailure(job.request.key, reason, "prompt")

    async def _conclude(self, results: Sequence[CaptureResult]) -> None:
        """Hand results on: to the rank that asked for a lost sample, or to the controller."""
        self._progress += len(results)
        first_time: list[CaptureResult] = []
        for result in results:
            asked = self._recaptures.pop(result.key, None)
            if asked is None:
                first_time.append(result)
            elif not asked.done():
                asked.set_result(result)
        if first_time:
            await self._controller.deliver(first_time)

    async def _start(self, slot: EngineSlot, error: Exception | None) -> bool:
        """Wait for an engine, which ``error`` may have taken; False if it is given up.

        Raises:
            GivenUpError: It was the last one.
        """
        since = time.monotonic()
        if await slot.start(error):
            if error is not None:
                self._note(Recovery(slot.name, str(error), time.monotonic() - since))
            self._changed.set()
            return True
        others = [other for other in self._slots if not other.is_given_up]
        if not others:
            raise GivenUpError(f"{slot.name}, the last one", str(error))
        others[0].garbage += slot.garbage
        slot.garbage = []
        self._changed.set()  # what avoids another engine may have waited for this one
        return False

    # Towards the trainers

    async def release(self, keys: Sequence[SampleKey]) -> None:
        """Samples were read and freed: their bytes may be used again."""
        self._free(keys)

    def _free(self, keys: Sequence[SampleKey]) -> None:
        jobs = [self._held.pop(key) for key in keys]
        self._progress += len(jobs)
        self._budget.release(
            sum(self._reserved_bytes(job.request.prompt.num_tokens) for job in jobs)
        )

    async def recapture(self, ref: SampleRef) -> CaptureResult:
        """Capture a lost sample again, under a new key and the bytes it already has."""
        job = self._held[ref.key]
        job.num_losses += 1
        self._progress += 1
        if job.num_losses > MAX_LOSSES:
            return self._reject(job, "lost from the store too often")
        asked: asyncio.Future[CaptureResult] = asyncio.get_running_loop().create_future()
        self._recaptures[ref.key] = asked
        self._try_again([job])
        return await asked

    # Towards the driver

    async def stats(self) -> CaptureStats:
        return CaptureStats(self._num_samples, self._num_bytes, self._budget.waited_s)

    async def pulse(self) -> Pulse:
        """Something moves while samples come and go, and while an engine is being started."""
        self._progress += any(slot.is_starting for slot in self._slots)
        budget = f"{self._budget.in_flight:,} of {self._budget.num_bytes:,} bytes are in flight"
        return Pulse(self._progress, (*(slot.describe() for slot in self._slots), budget))
