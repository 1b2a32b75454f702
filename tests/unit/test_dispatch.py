"""Which engine gets which prompts, and what happens to those of a lost one."""

import asyncio
import cProfile
import pstats

import pytest

from tests.fakes import FakeEngine, failing, make_prompts, sample
from tests.unit.control_plane import Rank, ids, policy, run, schedule, size_of
from torchspec_lib.controller import inference_manager
from torchspec_lib.controller.dispatch import next_calls
from torchspec_lib.controller.engine_slot import EngineSlot
from torchspec_lib.controller.inference_manager import InferenceManager
from torchspec_lib.controller.job_queue import Job, JobQueue
from torchspec_lib.controller.training_controller import TrainingController
from torchspec_lib.errors import GivenUpError
from torchspec_lib.types import (
    CaptureFailure,
    CaptureRequest,
    Recovery,
    SampleKey,
)


def make_jobs(num, lengths=lambda i: 4) -> list[Job]:
    return [
        Job(CaptureRequest(SampleKey.first("run", 0, prompt.prompt_id), prompt))
        for prompt in make_prompts(num, lengths)
    ]


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
    for job in make_jobs(5, lambda i: 30 if i == 0 else 8):
        queue.append(job)
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
    for job in make_jobs(4, lambda i: [20, 8, 8, 8][i]):
        queue.append(job)
    [(_, first)] = next_calls([slot], queue, few)
    assert first.num_tokens == 20
    asyncio.run(slot.finish(first))
    assert [call.num_tokens for _, call in next_calls([slot], queue, few)] == [8, 8]


def test_a_sample_takes_as_many_calls_however_many_there_are():
    """What they cost in time, ``benchmarks/pipeline.py`` shows."""

    def calls(num_prompts: int) -> float:
        engines = [FakeEngine(), FakeEngine()]
        with cProfile.Profile() as profile:
            run(num_prompts, engines, global_batch_size=128, num_samples_in_flight=256)
        return pstats.Stats(profile).total_calls / num_prompts

    few, many = calls(500), calls(4_000)
    assert many < 1.05 * few < 300


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


@pytest.mark.parametrize("pauses_s", [(0.3,), (0.0, 0.3)])
def test_an_engine_that_had_nothing_to_do_is_not_blamed_for_a_refusal(pauses_s):
    """Neither for the first, nor for one long after another."""

    def refuse(request):
        return CaptureFailure(request.key, "no answer", "store")

    async def work():
        slot = EngineSlot(0, FakeEngine(refuse), policy(hang_timeout_s=0.2))
        assert await slot.start(None)
        for job, pause_s in zip(make_jobs(2), pauses_s, strict=False):
            await asyncio.sleep(pause_s)
            await slot.finish(slot.begin([job]))
            assert slot.stuck() is None

    asyncio.run(work())


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
