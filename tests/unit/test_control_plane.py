"""Controller, manager and ledger together, with fake engines and trainers, without Ray."""

import asyncio
import pickle
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tests.fakes import BYTES_PER_TOKEN, FakeEngine, failing, make_prompts, sample
from torchspec_lib.controller.batching import split_step
from torchspec_lib.controller.inference_manager import CapturePolicy, InferenceManager
from torchspec_lib.controller.training_controller import Schedule, TrainingController
from torchspec_lib.errors import TooManyFailuresError, WorkerLostError
from torchspec_lib.types import (
    CaptureFailure,
    CaptureRequest,
    SampleKey,
    SampleRef,
    StepMetrics,
    StepReport,
)

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
    return CapturePolicy(**(values | {"request_size": 2, "max_attempts": 3} | changes))


@dataclass
class Rank:
    """A trainer as the control plane sees it; loses what ``lost`` names, once each."""

    rank: int
    lost: set[str] = field(default_factory=set)
    trained: list[SampleKey] = field(default_factory=list)
    steps: list[list[str]] = field(default_factory=list)
    num_micro_batches: list[int] = field(default_factory=list)

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
            metrics = METRICS if self.rank == 0 else None
            await controller.report(StepReport(step, self.rank, done, failed, metrics))

    async def _read(self, manager: InferenceManager, ref: SampleRef):
        if ref.key.prompt_id in self.lost:
            self.lost.remove(ref.key.prompt_id)
            return await manager.recapture(ref)
        return ref


def run(num_prompts=10, engines=None, ranks=None, resume=None, lengths=lambda i: 4, **changes):
    """One whole run; returns (totals, ranks, engines, manager, controller)."""
    engines = engines or [FakeEngine()]
    ranks = ranks or [Rank(0), Rank(1)]
    in_flight = changes.pop("num_samples_in_flight", 8)

    async def main():
        controller = TrainingController(
            make_prompts(num_prompts, lengths), schedule(**changes), *(resume or ())
        )
        manager = InferenceManager(
            controller, engines, policy(in_flight), lambda tokens: tokens * BYTES_PER_TOKEN
        )
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


def test_every_prompt_of_every_epoch_is_trained_exactly_once():
    totals, ranks, *_ = run(num_prompts=10, num_epochs=3)
    trained = Counter(ids(ranks[0].trained) + ids(ranks[1].trained))
    assert (totals.num_trained, totals.num_rejected) == (30, 0)
    assert trained == {f"p{i}": 3 for i in range(10)}


def test_prompts_left_over_are_trained_in_a_last_smaller_step():
    totals, ranks, *_ = run(num_prompts=10)
    assert totals.num_steps == 3
    assert [len(a) + len(b) for a, b in zip(ranks[0].steps, ranks[1].steps, strict=True)] == [
        4,
        4,
        2,
    ]


def test_steps_do_not_depend_on_which_engine_was_faster():
    alone = run(engines=[FakeEngine()])[1]
    several = run(engines=[FakeEngine(), FakeEngine(), FakeEngine()])[1]
    assert [rank.steps for rank in alone] == [rank.steps for rank in several]


def test_every_rank_gets_equally_many_micro_batches():
    _, ranks, *_ = run(num_prompts=11, lengths=lambda i: 1 + i % 8)
    assert ranks[0].num_micro_batches == ranks[1].num_micro_batches


def test_a_poisonous_prompt_is_rejected_with_its_reason_and_the_rest_is_trained():
    totals, *_ = run(engines=[FakeEngine(failing({"p3"}, retryable=False))])
    assert (totals.num_trained, totals.rejected) == (9, {"poison": 1})


def test_a_retryable_failure_is_tried_again_on_another_engine():
    bad = FakeEngine(failing({"p3"}, retryable=True))
    totals, _, engines, *_ = run(engines=[bad, FakeEngine()])
    attempts = [k for engine in engines for k in engine.captured if k.prompt_id == "p3"]
    assert totals.num_trained == 10
    assert len(set(attempts)) == len(attempts), "a key was used twice"
    assert len([k for k in bad.captured if k.prompt_id == "p3"]) <= 1


def test_retries_are_bounded():
    engine = FakeEngine(failing({"p3"}, retryable=True))
    totals, *_ = run(engines=[engine])
    assert totals.num_rejected == 1
    assert ids(engine.captured).count("p3") == 3


def test_a_dead_engines_prompts_go_to_the_others_and_its_samples_are_discarded():
    dying, other = FakeEngine(dies_after=3), FakeEngine()
    totals, *_ = run(num_prompts=20, engines=[dying, other])
    assert totals.num_trained == 20
    assert set(other.discarded) & set(dying.captured)


def test_the_death_of_the_last_engine_ends_the_run():
    with pytest.raises(WorkerLostError, match="last engine"):
        run(engines=[FakeEngine(dies_after=3)])


def test_a_lost_sample_is_captured_again_and_its_step_stays_the_same():
    undisturbed = run()[1]
    disturbed = [Rank(0, lost={f"p{i}" for i in range(10)}), Rank(1)]
    totals, ranks, *_ = run(ranks=disturbed)
    assert totals.num_trained == 10
    assert [rank.steps for rank in ranks] == [rank.steps for rank in undisturbed]
    assert {key.attempt for key in ranks[0].trained} == {2}


def test_all_bytes_are_given_back_at_the_end():
    engine = FakeEngine(failing({"p1", "p2"}, retryable=True))
    *_, manager, _ = run(engines=[engine], ranks=[Rank(0, lost={"p4", "p5"}), Rank(1)])
    assert manager._budget.in_flight == 0


def test_no_more_bytes_are_in_flight_than_the_budget_allows():
    peak = 0
    managers: list[InferenceManager] = []

    def watch(request: CaptureRequest):
        nonlocal peak
        peak = max(peak, managers[0]._budget.in_flight)
        return sample(request)

    class Watching(InferenceManager):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            managers.append(self)

    async def main():
        controller = TrainingController(make_prompts(40), schedule())
        engines = [FakeEngine(watch), FakeEngine(watch)]
        manager = Watching(controller, engines, policy(5), lambda tokens: tokens * BYTES_PER_TOKEN)
        capturing = asyncio.create_task(manager.run())
        await asyncio.gather(*(Rank(r).run(controller, manager) for r in range(2)))
        capturing.cancel()

    asyncio.run(asyncio.wait_for(main(), timeout=20))
    assert 4 * 4 * BYTES_PER_TOKEN <= peak <= 5 * 4 * BYTES_PER_TOKEN


def test_a_budget_of_one_global_batch_is_enough_to_finish_even_with_losses_and_failures():
    engines = [FakeEngine(failing({"p2", "p7"}, retryable=True)), FakeEngine()]
    ranks = [Rank(0, lost={"p1", "p9"}), Rank(1, lost={"p0", "p5"})]
    totals, *_ = run(num_prompts=23, engines=engines, ranks=ranks, num_samples_in_flight=4)
    assert totals.num_trained + totals.num_rejected == 23


def test_too_many_rejections_end_the_run_and_say_why():
    engine = FakeEngine(failing({f"p{i}" for i in range(6)}, retryable=False))
    with pytest.raises(TooManyFailuresError, match="poison"):
        run(engines=[engine], max_failed_fraction=0.2)


def test_a_resumed_run_takes_the_steps_that_the_undisturbed_one_would_have_taken():
    _, whole, _, _, controller = run(num_prompts=20, num_epochs=2)
    accounts = asyncio.run(controller.ledger_state(4))
    totals, resumed, *_ = run(num_prompts=20, num_epochs=2, resume=(4, accounts))
    assert [rank.steps for rank in resumed] == [rank.steps[4:] for rank in whole]
    assert totals.num_trained == 40


def test_messages_carry_no_more_than_ids_and_metadata():
    ref = sample(CaptureRequest(SampleKey.first("run", 0, "p0"), make_prompts(1)[0]))
    assert len(pickle.dumps(ref)) < 500


def test_ranks_are_balanced_by_tokens():
    refs = [SampleRef(SampleKey.first("r", 0, str(n)), n, n, {}) for n in [100, 10, 10, 30, 30, 20]]
    loads = [
        sum(ref.num_tokens for batch in rank for ref in batch)
        for rank in split_step(refs, world_size=2, micro_batch_tokens=100)
    ]
    assert loads == [100, 100]


def test_no_micro_batch_exceeds_its_token_budget():
    refs = [SampleRef(SampleKey.first("r", 0, str(n)), n, n, {}) for n in range(1, 40)]
    ranks = split_step(refs, world_size=3, micro_batch_tokens=64)
    assert max(sum(r.num_tokens for r in batch) for rank in ranks for batch in rank) <= 64
    assert sorted(r.num_tokens for rank in ranks for b in rank for r in b) == list(range(1, 40))
