"""An engine's place: its calls, what it left behind, and how it is brought back."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torchspec_lib.controller.job_queue import Job
from torchspec_lib.controller.limits import CapturePolicy
from torchspec_lib.errors import EngineError, HungError, RecoverableError
from torchspec_lib.types import CaptureFailure, CaptureRequest, CaptureResult, SampleKey

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """An engine as the manager calls it; a dead one raises ``WorkerLostError``.

    It may work on several calls at once, and answers each as soon as it is through with it.
    """

    async def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]: ...

    async def discard(self, keys: Sequence[SampleKey]) -> None:
        """Free samples that nobody will read, those too that are just being captured."""
        ...

    async def start(self, kill: bool) -> None:
        """Wait until it is ready. A dead one comes back by itself.

        Args:
            kill: It lives, and has to be ended first.

        Raises:
            RecoverableError: It can't be started, or not in time.
            EngineError: Its self-check failed.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Prompts that an engine has been given."""

    jobs: Sequence[Job]
    num_tokens: int
    generation: int
    start: float


class EngineSlot:
    """An engine, over all its restarts."""

    def __init__(self, index: int, engine: Engine, policy: CapturePolicy) -> None:
        """Take an engine that may still be starting."""
        self.index, self._engine, self._policy = index, engine, policy
        self.is_up = self.is_given_up = False
        self.num_restarts = 0
        """Without a sample in between."""
        self.num_tokens = 0
        """Of all the prompts that it has."""
        self.num_pauses = 0
        """Reasons to give it no calls for a while."""
        self._generation = 0
        self._calls: list[Call] = []
        self._answered = 0.0
        """When a call last came back: the turn of another may only then have come."""
        self._refused_since: float | None = None
        """Begin of the first of its last calls, if it could store no sample in any of them."""
        self.garbage: list[SampleKey] = []
        """Keys of given-up attempts. Their samples may come yet, so the engine that was to make
        them removes them: whatever it still did is done by then."""

    @property
    def name(self) -> str:
        return f"engine {self.index}"

    @property
    def is_idle(self) -> bool:
        return not self._calls

    @property
    def has_room(self) -> bool:
        """Whether it may get another call now. A suspect stays alone with its engine."""
        if not self.is_up or self.num_pauses:
            return False
        if not self._calls:
            return True
        return (
            len(self._calls) < self._policy.num_calls
            and self.num_tokens < self._policy.window_tokens
            and not self._calls[0].jobs[0].is_suspect
        )

    @property
    def is_starting(self) -> bool:
        return not (self.is_up or self.is_given_up)

    def begin(self, jobs: Sequence[Job]) -> Call:
        """Note that the engine gets ``jobs``; ``finish`` has to follow."""
        num_tokens = sum(job.num_tokens for job in jobs)
        call = Call(jobs, num_tokens, self._generation, time.monotonic())
        self._calls.append(call)
        self.num_tokens += num_tokens
        return call

    async def finish(self, call: Call) -> list[CaptureResult]:
        """Have a call's jobs captured: a result for each.

        Raises:
            WorkerLostError: The engine died, or hangs (``HungError``).
            EngineError: It is unusable.
            StoreUnavailableError: What earlier attempts left couldn't be freed.
        """
        working = asyncio.ensure_future(self._capture(call))
        try:
            while not working.done():
                patience_s = self._policy.hang_timeout_s
                left_s = patience_s + max(call.start, self._answered) - time.monotonic()
                if left_s <= 0:
                    silence = f"no answer for {patience_s:.0f} s to a call for samples"
                    raise HungError(self.name, silence)
                await asyncio.wait([working], timeout=left_s)
        finally:
            working.cancel()
            self._calls.remove(call)
            self.num_tokens -= call.num_tokens
        idle_s, self._answered = call.start - self._answered, time.monotonic()
        if self._refused_since is None or idle_s > self._policy.hang_timeout_s:
            self._refused_since = call.start
        results = working.result()
        if not all(_is_stores_fault(result) for result in results):
            self._refused_since = None
        return results

    def stuck(self) -> HungError | None:
        """What is wrong with an engine that finds no way into the store, while others may."""
        if not self.is_up or self._refused_since is None:
            return None
        kept_s = self._answered - self._refused_since
        if kept_s <= self._policy.hang_timeout_s:
            return None
        return HungError(self.name, f"it could store nothing for {kept_s:.0f} s")

    async def _capture(self, call: Call) -> list[CaptureResult]:
        if garbage := set(self.garbage):
            await self._engine.discard(list(garbage))
            self.garbage = [key for key in self.garbage if key not in garbage]
        return await self._engine.capture([job.request for job in call.jobs])

    def lose(self, call: Call, error: Exception) -> bool:
        """Note that the engine didn't survive a call; whether this is the first to say so."""
        if call.generation != self._generation:
            return False
        self._generation += 1
        self.is_up = False
        logger.error("event=engine_lost engine=%d cause=%s", self.index, error)
        return True

    async def start(self, error: Exception | None) -> bool:
        """Wait for the engine, or start it again if ``error`` took it; False if it is given up."""
        while self.num_restarts < self._policy.max_restarts or error is None:
            self.num_restarts += error is not None
            try:
                await self._engine.start(kill=isinstance(error, (HungError, EngineError)))
            except (RecoverableError, EngineError) as failure:
                logger.warning("event=engine_start_failed engine=%d cause=%s", self.index, failure)
                error = failure
            else:
                self.is_up = True
                self._answered, self._refused_since = time.monotonic(), None
                return True
        self.is_given_up = True
        return False

    def describe(self) -> str:
        """What it does, for people."""
        name = self.name
        if self.is_up and self._calls:
            seconds = time.monotonic() - min(call.start for call in self._calls)
            num_prompts = sum(len(call.jobs) for call in self._calls)
            return f"{name} has had {num_prompts} prompts for {seconds:.0f} s"
        if self.is_up:
            return f"{name} waits for prompts"
        return f"{name} is given up" if self.is_given_up else f"{name} is being started again"


def _is_stores_fault(result: CaptureResult) -> bool:
    return isinstance(result, CaptureFailure) and result.fault == "store"
