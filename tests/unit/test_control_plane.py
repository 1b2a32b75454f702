"""Order, budget and accounts of controller, manager and ledger together."""

import asyncio
import pickle
from collections import Counter

import pytest

from tests.fakes import BYTES_PER_TOKEN, FakeEngine, failing, make_prompts, sample
from tests.unit.control_plane import Rank, ids, policy, run, schedule, size_of
from torchspec_lib.controller.batching import split_step
from torchspec_lib.controller.inference_manager import InferenceManager
from torchspec_lib.controller.training_controller import TrainingController
from torchspec_lib.errors import TooManyFailuresError
from torchspec_lib.types import (
    CaptureRequest,
    SampleKey,
    SampleRef,
)


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


def test_a_run_without_a_usable_prompt_ends_whatever_share_it_tolerates():
    engine = FakeEngine(failing({f"p{i}" for i in range(10)}, fault="prompt"))
    with pytest.raises(TooManyFailuresError, match=r"all 10 prompts were rejected: 10 x poison"):
        run(engines=[engine], max_failed_fraction=1.0)


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
