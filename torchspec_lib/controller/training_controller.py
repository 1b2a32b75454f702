"""Decides what is trained when. Hands out prompts, collects results, composes steps.

Who waits for whom: the manager waits in ``take`` for nothing but the end of the data; a
trainer waits in ``next_step`` for the samples of its step; the driver waits in ``progress``
for a finished step. ``deliver`` wakes trainers, ``report`` wakes the driver. Nobody polls.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torchspec_lib.controller.batching import split_step
from torchspec_lib.controller.ledger import EpochOrder, Ledger, State
from torchspec_lib.errors import TooManyFailuresError, TorchSpecError
from torchspec_lib.types import (
    Accounts,
    CaptureFailure,
    CaptureRequest,
    CaptureResult,
    MicroBatch,
    Prompt,
    Pulse,
    SampleKey,
    SampleRef,
    StepManifest,
    StepMetrics,
    StepReport,
    pooled_accept_length,
)


class PromptTable(Protocol):
    """The prepared prompts, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Prompt: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the controller needs to know of a run."""

    run_id: str
    seed: int
    num_epochs: int
    global_batch_size: int
    world_size: int
    micro_batch_tokens: int
    max_failed_fraction: float


@dataclass(frozen=True, slots=True)
class RunTotals:
    """A settled run: trained, rejected and not trained are every prompt of every epoch."""

    num_steps: int
    num_trained: int
    num_rejected: int
    num_not_trained: int
    """Left when the training was stopped early."""
    rejected: dict[str, int]


class TrainingController:
    """Every prompt of every epoch is handed out once, in order, and accounted for."""

    def __init__(
        self,
        prompts: PromptTable,
        schedule: Schedule,
        resume_step: int = 0,
        resume_ledger: dict[str, Any] | None = None,
        note: Callable[[Sequence[StepMetrics]], None] = lambda _: None,
    ) -> None:
        """Hand out ``prompts`` as ``schedule`` says, or go on from a checkpoint's accounts.

        ``note`` gets the metrics of every finished step before a checkpoint may count it.
        """
        self._prompts, self._schedule, self._note = prompts, schedule, note
        self._order = EpochOrder(len(prompts), schedule.seed)
        self._ledger = Ledger(len(prompts) * schedule.num_epochs)
        self._taken = self._settled = (
            self._ledger.restore(resume_ledger) if resume_ledger is not None else 0
        )
        """Positions handed out; and those before the first whose fate is open."""
        self._batch: list[SampleRef] = []
        """Of the next step, as far as it is there."""
        self._last_step = resume_step
        self._positions: dict[tuple[int, str], int] = {}
        self._ready: dict[int, SampleRef] = {}
        self._manifests: dict[int, StepManifest] = {}
        self._cursors: dict[int, int] = {}
        self._reports: dict[int, list[StepReport]] = {}
        self._reported_step = resume_step
        self._num_seen = 0
        self._unseen: list[StepMetrics] = []
        """By the driver."""
        self._since_accounts: list[StepMetrics] = []
        self._handed_out = resume_step
        """The last step that any rank has been given."""
        self._stop_after: int | None = None
        self._is_settled = False
        self._beats: dict[int, tuple[float, str]] = {}
        self._error: TorchSpecError | None = None
        self._changed = asyncio.Condition()

    # Towards the manager

    async def take(self, max_prompts: int) -> list[CaptureRequest]:
        """The next prompts to capture, in order; none when all were handed out."""
        if self._is_settled:
            return []
        end = min(self._taken + max_prompts, len(self._ledger))
        requests = [self._request(position) for position in range(self._taken, end)]
        self._taken = end
        return requests

    def _request(self, position: int) -> CaptureRequest:
        epoch, index = self._order[position]
        prompt = self._prompts[index]
        self._ledger.move(position, State.CAPTURING)
        self._positions[epoch, prompt.prompt_id] = position
        return CaptureRequest(
            SampleKey.first(self._schedule.run_id, epoch, prompt.prompt_id), prompt
        )

    async def deliver(self, results: Sequence[CaptureResult]) -> None:
        """Take what became of prompts, finally: a sample, or a failure that rejects it."""
        if self._is_settled:
            return  # the training was stopped before they were needed
        for result in results:
            if isinstance(result, SampleRef):
                position = self._positions[result.key.epoch, result.key.prompt_id]
                self._ledger.move(position, State.READY)
                self._ready[position] = result
            else:
                self._reject(self._position(result.key), result)
        self._compose()
        await self._wake()

    def _reject(self, position: int, failure: CaptureFailure) -> None:
        self._ledger.move(position, State.REJECTED, failure.reason)
        num_rejected, limit = self._ledger.count(State.REJECTED), self._schedule.max_failed_fraction
        if num_rejected > limit * len(self._ledger) or num_rejected == len(self._ledger):
            reasons = [f"{n} x {reason}" for reason, n in self._ledger.rejections().items()]
            self._error = TooManyFailuresError(num_rejected, len(self._ledger), limit, reasons[:5])

    # Towards the trainers

    def _compose(self) -> None:
        """Make every step whose samples are all there; the last one may be smaller."""
        end, batch_size = len(self._ledger), self._schedule.global_batch_size
        while self._settled < end:
            state = self._ledger.state(self._settled)
            if state is State.READY:
                self._ledger.move(self._settled, State.DISPATCHED)
                self._batch.append(self._ready.pop(self._settled))
            elif state is not State.REJECTED:
                return
            self._settled += 1
            if len(self._batch) == batch_size or (self._batch and self._settled == end):
                self._make_step()

    def _make_step(self) -> None:
        self._last_step += 1
        schedule = self._schedule
        per_rank = split_step(self._batch, schedule.world_size, schedule.micro_batch_tokens)
        self._manifests[self._last_step] = StepManifest(self._last_step, per_rank)
        self._cursors[self._last_step] = self._settled
        self._batch = []

    @property
    def _all_composed(self) -> bool:
        return self._settled == len(self._ledger)

    async def next_step(self, rank: int, step: int) -> tuple[MicroBatch, ...] | None:
        """A rank's micro-batches of ``step``, once its samples are there; None past the end.

        Raises:
            TorchSpecError: The run has failed.
        """
        await self._wait_for(
            lambda: step in self._manifests or self._all_composed or self._is_past_stop(step)
        )
        manifest = self._manifests.get(step)
        if manifest is None or self._is_past_stop(step):
            return None
        self._handed_out = max(self._handed_out, step)
        return manifest.per_rank[rank]

    def _is_past_stop(self, step: int) -> bool:
        return self._stop_after is not None and step > self._stop_after

    async def beat(self, rank: int, doing: str) -> None:
        """A rank is alive, and doing that."""
        self._beats[rank] = (time.monotonic(), doing)

    async def report(self, report: StepReport) -> None:
        """One rank has finished a step. When all have, the step's samples count as trained."""
        reports = self._reports.setdefault(report.step, [])
        reports.append(report)
        if len(reports) < self._schedule.world_size:
            return
        del self._reports[report.step], self._manifests[report.step]
        for done in reports:
            for key in done.trained:
                self._ledger.move(self._position(key), State.TRAINED)
            for failure in done.rejected:
                self._reject(self._position(failure.key), failure)
        metrics = [r.metrics for r in reports if r.metrics is not None]
        self._note(metrics)
        self._unseen += metrics
        self._since_accounts += metrics
        self._reported_step = report.step
        await self._wake()

    def _position(self, key: SampleKey) -> int:
        """Where a key's prompt stands; asked once, when its fate is sealed."""
        return self._positions.pop((key.epoch, key.prompt_id))

    async def accounts(self, step: int) -> Accounts:
        """The accounts after ``step``, once every rank has reported it. To be asked in order."""
        await self._wait_for(lambda: self._reported_step >= step)
        done = [metrics for metrics in self._since_accounts if metrics.step <= step]
        del self._since_accounts[: len(done)]
        snapshot = self._ledger.snapshot(self._cursors[step])
        self._cursors = {s: cursor for s, cursor in self._cursors.items() if s >= step}
        return Accounts(snapshot, pooled_accept_length(done))

    # Towards the driver

    async def progress(self, num_seen: int) -> list[StepMetrics]:
        """Metrics of the steps after the first ``num_seen`` finished ones, as soon as there are."""
        del self._unseen[: num_seen - self._num_seen]
        self._num_seen = num_seen
        await self._wait_for(lambda: self._unseen)
        return list(self._unseen)

    async def stop(self) -> None:
        """End the run early: no rank gets a step that no other rank has been given yet."""
        self._stop_after = self._handed_out
        await self._wake()

    async def pulse(self) -> Pulse:
        """Something moves while steps are finished."""
        now = time.monotonic()
        ranks = tuple(
            f"trainer rank {rank}: {doing}, {now - at:.0f} s ago"
            for rank, (at, doing) in sorted(self._beats.items())
        )
        return Pulse(self._reported_step, ranks)

    async def finish(self, stopped_early: bool = False) -> RunTotals:
        """Settle the accounts, once no rank trains any more.

        Args:
            stopped_early: What is left is then no fault.

        Raises:
            LedgerError: A prompt is neither trained nor rejected.
        """
        if stopped_early:
            self._ledger.leave_rest()
        self._ledger.settle()
        self._is_settled = True
        return RunTotals(
            num_steps=self._reported_step,
            num_trained=self._ledger.count(State.TRAINED),
            num_rejected=self._ledger.count(State.REJECTED),
            num_not_trained=self._ledger.count(State.NOT_TRAINED),
            rejected=self._ledger.rejections(),
        )

    async def _wait_for(self, condition: Callable[[], object]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._error or condition())
        if self._error is not None:
            raise self._error

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()
