"""The thread that fetches a rank's samples ahead of its steps."""

import threading
import time

import pytest

from tests.unit.prefetching import HIDDEN, WAIT_S, Control, prefetcher_of, put
from torchspec_lib.errors import TooManyFailuresError
from torchspec_lib.transfer.memory import MemoryStore


@pytest.fixture
def store():
    return MemoryStore(capacity_bytes=1 << 20)


def test_a_step_arrives_packed_as_the_controller_composed_it(store):
    a, b, c = put(store, "a", 3, 1), put(store, "b", 2, 2), put(store, "c", 4, 3)
    control = Control(store, {1: ((a, b), (c,), ())})
    with prefetcher_of(control, store) as prefetcher:
        [step] = list(prefetcher)
    assert (step.step, step.trained, step.rejected) == (1, (a.key, b.key, c.key), ())
    assert step.num_tokens == 9
    assert [batch.doc_starts for batch in step.batches] == [(0, 3, 5), (0, 4), (0, 1)]
    assert step.batches[0].input_ids_T.tolist() == [1, 1, 1, 2, 2]
    assert not step.batches[2].loss_mask_T.any()


def test_samples_leave_the_store_once_copied_and_give_their_bytes_back_once_a_step(store):
    refs = [put(store, name) for name in "abcd"]
    control = Control(store, {1: ((refs[0],), (refs[1],)), 2: ((refs[2], refs[3]),)})
    with prefetcher_of(control, store) as prefetcher:
        next(iter(prefetcher))
        assert control.wait_until_asked(3)
    assert store.held_bytes == 0
    keys = [ref.key for ref in refs]
    assert control.given_back == [(keys[0], keys[1]), (keys[2], keys[3])]


def test_as_many_steps_as_asked_for_are_fetched_ahead_and_no_more(store):
    refs = {step: put(store, f"p{step}") for step in range(1, 7)}
    control = Control(store, {step: ((ref,),) for step, ref in refs.items()})
    with prefetcher_of(control, store, prefetch_steps=2) as prefetcher:
        assert control.wait_until_asked(2)
        steps = iter(prefetcher)
        assert next(steps).step == 1
        assert control.wait_until_asked(3)
        with control.changed:
            assert not control.changed.wait_for(lambda: len(control.asked) > 3, timeout=0.1)
        assert [step.step for step in steps] == [2, 3, 4, 5, 6]
    assert control.asked == [(1, step) for step in range(1, 8)]


def test_a_run_goes_on_at_the_step_it_is_told(store):
    control = Control(store, {4: ((put(store, "a"),),)})
    with prefetcher_of(control, store, first_step=4) as prefetcher:
        assert [step.step for step in prefetcher] == [4]


def test_a_lost_sample_is_captured_again_and_keeps_its_place(store):
    kept, lost = put(store, "kept"), put(store, "lost", num_tokens=2)
    store.release([lost.key])
    control = Control(store, {1: ((lost, kept),)})
    with prefetcher_of(control, store) as prefetcher:
        [step] = list(prefetcher)
    assert control.recaptured == [lost.key]
    assert [key.attempt for key in step.trained] == [2, 1]
    assert step.batches[0].input_ids_T.tolist() == [7, 7, 1, 1, 1]
    assert control.given_back == [step.trained]
    assert store.held_bytes == 0


def test_what_the_thread_is_at_can_be_read(store):
    said = []

    class TellingControl(Control):
        def next_step(self, rank, step):
            said.append(prefetcher.doing)
            return super().next_step(rank, step)

        def fetched(self, keys):
            said.append(prefetcher.doing)

        def recapture(self, ref):
            said.append(prefetcher.doing)
            return super().recapture(ref)

    lost = put(store, "lost")
    store.release([lost.key])
    control = TellingControl(store, {1: ((put(store, "a"),),), 2: ((lost,),)})
    prefetcher = prefetcher_of(control, store, prefetch_steps=9)
    with prefetcher:
        list(prefetcher)
        assert prefetcher.doing == "all is fetched"
    assert said == [
        "waiting for samples of step 1",
        "fetching step 1",
        "waiting for samples of step 2",
        f"capturing sample {lost.key} again",
        f"capturing sample {lost.key} again",
        "waiting for samples of step 3",
    ]


def test_a_sample_that_is_lost_for_good_is_rejected_and_its_micro_batch_stays(store):
    kept, lost = put(store, "kept"), put(store, "lost")
    store.release([lost.key])
    control = Control(store, {1: ((kept,), (lost,))}, rejects=True)
    with prefetcher_of(control, store) as prefetcher:
        [step] = list(prefetcher)
    assert step.trained == (kept.key,)
    assert step.num_tokens == 3
    [failure] = step.rejected
    assert (failure.key.prompt_id, failure.reason) == ("lost", "gone")
    assert [batch.num_tokens for batch in step.batches] == [3, 1]
    assert not step.batches[1].loss_mask_T.any()


def test_a_sample_that_is_lost_for_good_leaves_no_gap_among_its_neighbours(store):
    first, lost, last = put(store, "a", 3, 1), put(store, "b", 2, 2), put(store, "c", 4, 3)
    store.release([lost.key])
    control = Control(store, {1: ((first, lost, last),)}, rejects=True)
    with prefetcher_of(control, store) as prefetcher:
        [step] = list(prefetcher)
    [batch] = step.batches
    assert batch.doc_starts == (0, 3, 7)
    assert batch.input_ids_T.tolist() == [1] * 3 + [3] * 4
    assert batch.aux_states_TA[:, 0].tolist() == [1.0] * 3 + [3.0] * 4
    assert batch.last_states_TH.shape == (7, HIDDEN)


class FailingControl(Control):
    def next_step(self, rank, step):
        if step > 1:
            raise TooManyFailuresError(3, 4, 0.05, ["poison"])
        return super().next_step(rank, step)


def test_what_ends_the_run_is_raised_after_the_steps_before_it(store):
    control = FailingControl(store, {1: ((put(store, "a"),),)})
    with prefetcher_of(control, store) as prefetcher:
        steps = iter(prefetcher)
        assert next(steps).step == 1
        with pytest.raises(TooManyFailuresError, match="3 of 4"):
            next(steps)


class SlowControl(Control):
    def next_step(self, rank, step):
        if step == 2:
            time.sleep(0.2)
        return super().next_step(rank, step)


def test_the_time_that_the_trainer_waited_is_measured(store):
    control = SlowControl(store, {step: ((put(store, f"p{step}"),),) for step in (1, 2, 3)})
    with prefetcher_of(control, store) as prefetcher:
        waits = {}
        for step in prefetcher:
            waits[step.step] = step.wait_s
            if step.step == 2:
                assert control.wait_until_asked(4)
    assert 0.1 < waits[2] < WAIT_S
    assert waits[3] < 0.05


def test_leaving_early_ends_the_thread(store):
    control = Control(store, {step: ((put(store, f"p{step}"),),) for step in range(1, 9)})
    with prefetcher_of(control, store, prefetch_steps=1) as prefetcher:
        next(iter(prefetcher))
        assert "prefetch" in {thread.name for thread in threading.enumerate()}
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}
    assert store.held_bytes > 0
