"""Whole runs of controller, manager and ledger, with fake engines and trainers, without Ray."""

import asyncio
from dataclasses import dataclass, field, replace

from tests.fakes import BYTES_PER_TOKEN, FakeEngine, make_prompts
from torchspec_lib.controller.inference_manager import InferenceManager
from torchspec_lib.controller.limits import CapturePolicy
from torchspec_lib.controller.training_controller import Schedule, TrainingController
from torchspec_lib.types import (
    CaptureFailure,
    SampleKey,
    SampleRef,
    StepMetrics,
    StepReport,
)

LIMITS = {
    "call_prompts": 2,
    "num_calls": 2,
    "window_tokens": 80,
    "max_attempts": 3,
    "max_restarts": 5,
    "hang_timeout_s": 60.0,
}


METRICS = StepMetrics(1, 1.0, 1e-3, 1.0, (2,), (1,), 1, 4, 2, 0.1, 0.0)


def schedule(**changes) -> Schedule:
    values = {
        "run_id": "run",
        "seed": 0,
        "num_epochs": 1,
        "global_batch_size": 4,
        "world_size": 2,
        "micro_batch_tokens": 8,
        "max_failed_fraction": 1.0,
    }
    return Schedule(**(values | changes))


def policy(num_samples_in_flight: int = 8, **changes) -> CapturePolicy:
    values = {"max_in_flight_bytes": num_samples_in_flight * 4 * BYTES_PER_TOKEN}
    return CapturePolicy(**(values | LIMITS | changes))


@dataclass
class Rank:
    """A trainer as the control plane sees it; loses what ``lost`` names, once each."""

    rank: int
    lost: set[str] = field(default_factory=set)
    trained: list[SampleKey] = field(default_factory=list)
    steps: list[list[str]] = field(default_factory=list)
    num_micro_batches: list[int] = field(default_factory=list)
    matches: list[int] = field(default_factory=lambda: [1] * 100)
    """Of two chains, in every step."""

    async def run(self, controller: TrainingController, manager: InferenceManager, step=0) -> None:
        while (batches := await controller.next_step(self.rank, step := step + 1)) is not None:
            self.num_micro_batches.append(len(batches))
            refs = [ref for batch in batches for ref in batch]
            self.steps.append([ref.key.prompt_id for ref in refs])
            results = [await self._read(manager, ref) for ref in refs]
            done = tuple(r.key for r in results if isinstance(r, SampleRef))
            failed = tuple(r for r in results if isinstance(r, CaptureFailure))
            self.trained += done
            await manager.release(done)
            figures = replace(METRICS, step=step, matches=(self.matches[step - 1],))
            metrics = figures if self.rank == 0 else None
            await controller.report(StepReport(step, self.rank, done, failed, metrics))

    async def _read(self, manager: InferenceManager, ref: SampleRef):
        if ref.key.prompt_id in self.lost:
            self.lost.remove(ref.key.prompt_id)
            return await manager.recapture(ref)
        return ref


def size_of(num_tokens: int) -> int:
    return num_tokens * BYTES_PER_TOKEN


def run(num_prompts=10, engines=None, ranks=None, resume=None, lengths=lambda i: 4, **changes):
    """One whole run; returns (totals, ranks, engines, manager, controller)."""
    engines = engines or [FakeEngine()]
    ranks = ranks or [Rank(0), Rank(1)]
    in_flight = changes.pop("num_samples_in_flight", 8)
    limits = {name: changes.pop(name) for name in LIMITS if name in changes}

    async def main():
        controller = TrainingController(
            make_prompts(num_prompts, lengths), schedule(**changes), *(resume or ())
        )
        manager = InferenceManager(controller, engines, policy(in_flight, **limits), size_of)
        capturing = asyncio.create_task(manager.run())
        first_step = resume[0] if resume else 0
        training = asyncio.gather(*(rank.run(controller, manager, first_step) for rank in ranks))
        try:
            await asyncio.wait([capturing, training], return_when=asyncio.FIRST_COMPLETED)
            if capturing.done():
                await capturing
            await training
        finally:
            capturing.cancel()
            training.cancel()
        return await controller.finish(), ranks, engines, manager, controller

    return asyncio.run(asyncio.wait_for(main(), timeout=20))


def ids(keys) -> list[str]:
    return [key.prompt_id for key in keys]
