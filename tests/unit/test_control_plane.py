"""Controller, manager and ledger together, with fake engines and trainers, without Ray."""

import asyncio
import pickle
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from tests.fakes import BYTES_PER_TOKEN, FakeEngine, failing, make_prompts, sample
from torchspec_lib.controller import inference_manager
from torchspec_lib.controller.batching import split_step
from torchspec_lib.controller.dispatch import next_calls
from torchspec_lib.controller.engine_slot import EngineSlot
from torchspec_lib.controller.inference_manager import InferenceManager
from torchspec_lib.controller.job_queue import Job, JobQueue
from torchspec_lib.controller.limits import CapturePolicy
from torchspec_lib.controller.training_controller import Schedule, TrainingController
from torchspec_lib.errors import GivenUpError, TooManyFailuresError
from torchspec_lib.types import (
    CaptureFailure,
    CaptureRequest,
    Recovery,
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
    totals, *_ = run(engines=[FakeEngine(failing({"p3"}, fault="prompt"))])
    assert (totals.num_trained, totals.rejected) == (9, {"poison": 1})


def test_a_retryable_failure_is_tried_again_on_another_engine():
    bad = FakeEngine(failing({"p3"}, fault="engine"))
    totals, _, engines, *_ = run(engines=[bad, FakeEngine()])
    attempts = [k for engine in engines for k in engine.captured if k.prompt_id == "p3"]
    assert totals.num_trained == 10
    assert len(set(attempts)) == len(attempts), "a key was used twice"
    assert len([k for k in bad.captured if k.prompt_id == "p3"]) <= 1


def test_retries_are_bounded():
    engine = FakeEngine(failing({"p3"}, fault="engine"))
    totals, *_ = run(engines=[engine])
    assert totals.num_rejected == 1
    assert ids(engine.captured).count("p3") == 3


def test_a_dead_engines_prompts_are_captured_all_the_same_and_what_it_left_is_removed():
    dying, other = FakeEngine(dies_at=[2]), FakeEngine()
    totals, *_ = run(num_prompts=20, engines=[dying, other])
    assert totals.num_trained == 20
    assert set(dying.discarded) < set(dying.captured)
    assert not set(other.discarded) & set(dying.captured), "before it was surely dead"


def test_a_dead_engine_comes_back_also_if_it_is_the_only_one():
    engine = FakeEngine(dies_at=[2, 5, 9])
    totals, *_ = run(num_prompts=20, engines=[engine])
    assert (totals.num_trained, totals.num_rejected) == (20, 0)
    assert engine.starts == [False] * 4, "at first, and after each death"


def test_an_engine_that_hangs_is_ended_and_started_again():
    engine = FakeEngine(hangs_at=[2])
    totals, *_ = run(num_prompts=20, engines=[engine], hang_timeout_s=0.2)
    assert totals.num_trained == 20
    assert engine.starts == [False, True]


def test_a_call_that_waits_for_the_one_before_it_does_not_pass_for_hung():
    class Slow(FakeEngine):
        """One call after the other, as an engine works."""

        def __init__(self) -> None:
            super().__init__()
            self.turn = asyncio.Lock()

        async def capture(self, requests):
            async with self.turn:
                await asyncio.sleep(0.15)
                return await super().capture(requests)

    engine = Slow()
    totals, *_ = run(num_prompts=12, engines=[engine], hang_timeout_s=0.2)
    assert totals.num_trained == 12
    assert engine.starts == [False]


def test_a_long_prompt_keeps_no_short_one_waiting():
    short_ones = asyncio.Event()

    class SideBySide(FakeEngine):
        """Through with the long prompt only after all the others."""

        async def capture(self, requests):
            if requests[0].prompt.num_tokens == 60:
                assert len(requests) == 1, "it shares its call"
                await short_ones.wait()
            results = await super().capture(requests)
            if len(self.captured) == 19:
                short_ones.set()
            return results

    totals, *_ = run(
        num_prompts=20,
        engines=[SideBySide()],
        lengths=lambda i: 60 if i == 3 else 4,
        micro_batch_tokens=64,
        num_samples_in_flight=40,
    )
    assert totals.num_trained == 20


def test_the_engine_with_the_fewest_outstanding_tokens_gets_the_next_prompts():
    slots = [EngineSlot(i, FakeEngine(), policy(call_prompts=1, num_calls=4)) for i in range(2)]
    queue = JobQueue()
    for prompt in make_prompts(5, lambda i: 30 if i == 0 else 8):
        queue.append(Job(CaptureRequest(SampleKey.first("run", 0, prompt.prompt_id), prompt)))
    for slot in slots:
        slot.is_up = True
    calls = next_calls(slots, queue, policy(call_prompts=1, num_calls=4))
    assert [(slot.index, call.num_tokens) for slot, call in calls] == [
        (0, 30),
        (1, 8),
        (1, 8),
        (1, 8),
        (1, 8),
    ]


def test_an_engine_gets_no_more_than_its_window_holds_but_always_one_prompt():
    few = policy(call_prompts=1, num_calls=4, window_tokens=16)
    slot, queue = EngineSlot(0, FakeEngine(), few), JobQueue()
    slot.is_up = True
    for prompt in make_prompts(4, lambda i: [20, 8, 8, 8][i]):
        queue.append(Job(CaptureRequest(SampleKey.first("run", 0, prompt.prompt_id), prompt)))
    [(_, first)] = next_calls([slot], queue, few)
    assert first.num_tokens == 20
    asyncio.run(slot.finish(first))
    assert [call.num_tokens for _, call in next_calls([slot], queue, few)] == [8, 8]


def test_a_sample_costs_the_control_plane_less_than_100_us_however_many_there_are():
    def cpu_s(num_prompts: int) -> float:
        start = time.process_time()
        engines = [FakeEngine(), FakeEngine()]
        run(num_prompts, engines, global_batch_size=128, num_samples_in_flight=256)
        return time.process_time() - start

    cpu_s(200)
    few, many = cpu_s(1_000) / 1_000, cpu_s(10_000) / 10_000
    assert many < 100e-6
    assert many < 3 * few


def test_a_prompt_that_ends_engines_is_found_and_no_other_is_blamed_for_it():
    engines = [FakeEngine(kills=["p3"]), FakeEngine(kills=["p3"])]
    totals, *_ = run(num_prompts=20, engines=engines, call_prompts=4)
    assert totals.rejected == {"its engines died": 1}
    assert totals.num_trained == 19


def test_the_death_of_the_last_engine_ends_the_run_once_it_cannot_be_started():
    class Dying(FakeEngine):
        async def capture(self, requests):
            self.startable = False
            return await super().capture(requests)

    engine = Dying(dies_at=[1])
    with pytest.raises(GivenUpError, match=r"engine 0, the last one.*killed"):
        run(engines=[engine])


def test_an_engine_that_is_given_up_leaves_its_work_to_the_others():
    gone, other = FakeEngine(startable=False), FakeEngine()
    totals, *_ = run(num_prompts=20, engines=[gone, other])
    assert totals.num_trained == 20
    assert gone.captured == []


def test_a_store_that_is_full_for_a_while_costs_no_prompt(monkeypatch):
    monkeypatch.setattr(inference_manager, "STORE_PAUSE_S", 0.01)
    num_refusals = 30

    def full_at_first(request: CaptureRequest):
        nonlocal num_refusals
        num_refusals -= 1
        if num_refusals > 0:
            return CaptureFailure(request.key, "full", "store")
        return sample(request)

    engine = FakeEngine(full_at_first)
    totals, _, _, manager, _ = run(num_prompts=10, engines=[engine])
    assert (totals.num_trained, totals.num_rejected) == (10, 0)
    assert manager._budget.in_flight == 0


def test_an_engine_that_finds_no_way_into_the_store_is_started_again(monkeypatch):
    monkeypatch.setattr(inference_manager, "STORE_PAUSE_S", 0.05)

    class Detached(FakeEngine):
        """Frozen while the store's client process was started again."""

        async def capture(self, requests):
            results = await super().capture(requests)
            if any(self.starts):
                return results
            return [CaptureFailure(result.key, "no answer", "store") for result in results]

    engine = Detached()
    totals, *_ = run(num_prompts=10, engines=[engine], hang_timeout_s=0.3)
    assert totals.num_trained == 10
    assert engine.starts == [False, True]


def test_every_recovery_is_noted_with_its_engine_and_its_cause():
    notes: list[Recovery] = []

    async def main():
        controller = TrainingController(make_prompts(20), schedule())
        engines = [FakeEngine(), FakeEngine(dies_at=[2])]
        manager = InferenceManager(controller, engines, policy(), size_of, notes.append)
        capturing = asyncio.create_task(manager.run())
        await asyncio.gather(*(Rank(r).run(controller, manager) for r in range(2)))
        capturing.cancel()

    asyncio.run(asyncio.wait_for(main(), timeout=20))
    assert [(note.part, note.cause) for note in notes] == [("engine 1", "lost engine: killed")]


def test_a_lost_sample_is_captured_again_and_its_step_stays_the_same():
    undisturbed = run()[1]
    disturbed = [Rank(0, lost={f"p{i}" for i in range(10)}), Rank(1)]
    totals, ranks, *_ = run(ranks=disturbed)
    assert totals.num_trained == 10
    assert [rank.steps for rank in ranks] == [rank.steps for rank in undisturbed]
    assert {key.attempt for key in ranks[0].trained} == {2}


def test_all_bytes_are_given_back_at_the_end():
    engine = FakeEngine(failing({"p1", "p2"}, fault="engine"))
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
        manager = Watching(controller, engines, policy(5), size_of)
        capturing = asyncio.create_task(manager.run())
        await asyncio.gather(*(Rank(r).run(controller, manager) for r in range(2)))
        capturing.cancel()

    asyncio.run(asyncio.wait_for(main(), timeout=20))
    assert 4 * 4 * BYTES_PER_TOKEN <= peak <= 5 * 4 * BYTES_PER_TOKEN


def test_a_budget_of_one_global_batch_is_enough_to_finish_even_with_losses_and_failures():
    engines = [FakeEngine(failing({"p2", "p7"}, fault="engine")), FakeEngine()]
    ranks = [Rank(0, lost={"p1", "p9"}), Rank(1, lost={"p0", "p5"})]
    totals, *_ = run(num_prompts=23, engines=engines, ranks=ranks, num_samples_in_flight=4)
    assert totals.num_trained + totals.num_rejected == 23


def test_too_many_rejections_end_the_run_and_say_why():
    engine = FakeEngine(failing({f"p{i}" for i in range(6)}, fault="prompt"))
    with pytest.raises(TooManyFailuresError, match="poison"):
        run(engines=[engine], max_failed_fraction=0.2)


def test_a_resumed_run_takes_the_steps_that_the_undisturbed_one_would_have_taken():
    _, whole, _, _, controller = run(num_prompts=20, num_epochs=2)
    accounts = asyncio.run(controller.accounts(4))
    totals, resumed, *_ = run(num_prompts=20, num_epochs=2, resume=(4, accounts.ledger))
    assert [rank.steps for rank in resumed] == [rank.steps[4:] for rank in whole]
    assert totals.num_trained == 40


def test_accounts_say_the_accept_length_of_the_steps_since_they_were_last_asked_for():
    async def main():
        controller = TrainingController(make_prompts(8), schedule(global_batch_size=2))
        manager = InferenceManager(controller, [FakeEngine()], policy(), size_of)
        capturing = asyncio.create_task(manager.run())
        rank = Rank(0, matches=[0, 0, 2, 2])
        await asyncio.gather(rank.run(controller, manager), Rank(1).run(controller, manager))
        capturing.cancel()
        return [(await controller.accounts(step)).accept_length for step in (2, 3, 4)]

    assert asyncio.run(asyncio.wait_for(main(), timeout=20)) == [1.0, 2.0, 2.0]


def test_a_run_that_is_stopped_ends_all_ranks_after_the_same_step():
    async def main():
        controller = TrainingController(make_prompts(100), schedule())
        manager = InferenceManager(controller, [FakeEngine()], policy(), size_of)
        capturing = asyncio.create_task(manager.run())
        first = await controller.next_step(0, 1)
        await controller.stop()
        ahead = await controller.next_step(0, 2)
        behind = [await controller.next_step(1, step) for step in (1, 2)]
        capturing.cancel()
        return first, ahead, behind

    first, ahead, behind = asyncio.run(asyncio.wait_for(main(), timeout=20))
    assert first is not None
    assert ahead is None
    assert [micro_batches is None for micro_batches in behind] == [False, True]


def test_the_pulse_moves_with_the_work_and_says_what_each_part_does():
    async def main():
        controller = TrainingController(make_prompts(100), schedule())
        manager = InferenceManager(controller, [FakeEngine()], policy(), size_of)
        capturing = asyncio.create_task(manager.run())
        before = await manager.pulse()
        await controller.next_step(0, 1)
        await controller.beat(0, "training step 1")
        await asyncio.sleep(0.05)
        during, after = await manager.pulse(), await manager.pulse()
        said = await controller.pulse()
        capturing.cancel()
        return before, during, after, said

    before, during, after, said = asyncio.run(asyncio.wait_for(main(), timeout=20))
    assert before.progress < during.progress == after.progress, "the byte budget is used up"
    assert during.doing == ("engine 0 waits for prompts", "320 of 320 bytes are in flight")
    assert said.doing[0].startswith("trainer rank 0: training step 1, 0 s ago")


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
