import threading
import time
from dataclasses import dataclass, field

import pytest
import torch

from torchspec_lib.errors import StoreUnavailableError, TooManyFailuresError
from torchspec_lib.models.batch import empty_batch
from torchspec_lib.training.prefetch import Prefetcher
from torchspec_lib.transfer.memory import MemoryStore
from torchspec_lib.types import CaptureFailure, SampleKey

HIDDEN, AUX = 4, 12
WAIT_S = 5.0


def _tensors(num_tokens, fill):
    return {
        "input_ids": torch.full((num_tokens,), fill, dtype=torch.int32),
        "loss_mask": torch.ones(num_tokens, dtype=torch.bool),
        "aux_hidden_states": torch.full((num_tokens, AUX), float(fill)),
        "last_hidden_states": torch.full((num_tokens, HIDDEN), float(fill)),
    }


@dataclass
class Control:
    """Hands out prepared steps, and notes what it is told."""

    store: MemoryStore
    steps: dict
    rejects: bool = False
    """Whether a lost sample can't be captured again."""
    asked: list = field(default_factory=list)
    given_back: list = field(default_factory=list)
    recaptured: list = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def next_step(self, rank, step):
        with self.changed:
            self.asked.append((rank, step))
            self.changed.notify_all()
        return self.steps.get(step)

    def fetched(self, keys):
        self.given_back.append(tuple(keys))

    def recapture(self, ref):
        self.recaptured.append(ref.key)
        key = ref.key.next_attempt()
        if self.rejects:
            return CaptureFailure(key, "gone", fault="prompt")
        return self.store.put(key, _tensors(ref.num_tokens, 7))

    def wait_until_asked(self, num_times):
        with self.changed:
            return self.changed.wait_for(lambda: len(self.asked) >= num_times, WAIT_S)


@pytest.fixture
def store():
    return MemoryStore(capacity_bytes=1 << 20)


def _put(store, name, num_tokens=3, fill=1):
    return store.put(SampleKey.first("run", 0, name), _tensors(num_tokens, fill))


def _prefetcher(control, store, prefetch_steps=2, first_step=1):
    return Prefetcher(
        control,
        store,
        rank=1,
        first_step=first_step,
        prefetch_steps=prefetch_steps,
        empty=empty_batch(AUX, HIDDEN, torch.float32),
        pin_memory=False,
    )


def test_a_step_arrives_packed_as_the_controller_composed_it(store):
    a, b, c = _put(store, "a", 3, 1), _put(store, "b", 2, 2), _put(store, "c", 4, 3)
    control = Control(store, {1: ((a, b), (c,), ())})
    with _prefetcher(control, store) as prefetcher:
        [step] = list(prefetcher)
    assert (step.step, step.trained, step.rejected) == (1, (a.key, b.key, c.key), ())
    assert step.num_tokens == 9
    assert [batch.doc_starts for batch in step.batches] == [(0, 3, 5), (0, 4), (0, 1)]
    assert step.batches[0].input_ids_T.tolist() == [1, 1, 1, 2, 2]
    assert not step.batches[2].loss_mask_T.any()


def test_samples_leave_the_store_once_copied_and_give_their_bytes_back_once_a_step(store):
    refs = [_put(store, name) for name in "abcd"]
    control = Control(store, {1: ((refs[0],), (refs[1],)), 2: ((refs[2], refs[3]),)})
    with _prefetcher(control, store) as prefetcher:
        next(iter(prefetcher))
        assert control.wait_until_asked(3)
    assert store.held_bytes == 0
    keys = [ref.key for ref in refs]
    assert control.given_back == [(keys[0], keys[1]), (keys[2], keys[3])]


def test_as_many_steps_as_asked_for_are_fetched_ahead_and_no_more(store):
    refs = {step: _put(store, f"p{step}") for step in range(1, 7)}
    control = Control(store, {step: ((ref,),) for step, ref in refs.items()})
    with _prefetcher(control, store, prefetch_steps=2) as prefetcher:
        assert control.wait_until_asked(2)
        steps = iter(prefetcher)
        assert next(steps).step == 1
        assert control.wait_until_asked(3)
        with control.changed:
            assert not control.changed.wait_for(lambda: len(control.asked) > 3, timeout=0.1)
        assert [step.step for step in steps] == [2, 3, 4, 5, 6]
    assert control.asked == [(1, step) for step in range(1, 8)]


def test_a_run_goes_on_at_the_step_it_is_told(store):
    control = Control(store, {4: ((_put(store, "a"),),)})
    with _prefetcher(control, store, first_step=4) as prefetcher:
        assert [step.step for step in prefetcher] == [4]


def test_a_lost_sample_is_captured_again_and_keeps_its_place(store):
    kept, lost = _put(store, "kept"), _put(store, "lost", num_tokens=2)
    store.release([lost.key])
    control = Control(store, {1: ((lost, kept),)})
    with _prefetcher(control, store) as prefetcher:
        [step] = list(prefetcher)
    assert control.recaptured == [lost.key]
    assert [key.attempt for key in step.trained] == [2, 1]
    assert step.batches[0].input_ids_T.tolist() == [7, 7, 1, 1, 1]
    assert control.given_back == [step.trained]
    assert store.held_bytes == 0


class FlakyStore(MemoryStore):
    """Doesn't answer the first reader."""

    def __init__(self, num_refusals, **kwargs):
        super().__init__(**kwargs)
        self.num_refusals = num_refusals

    def borrow(self, ref):
        if self.num_refusals:
            self.num_refusals -= 1
            raise StoreUnavailableError("get", "it is away")
        return super().borrow(ref)


def test_a_store_that_is_away_for_a_while_is_waited_for():
    store = FlakyStore(num_refusals=2, capacity_bytes=1 << 20)
    control = Control(store, {1: ((_put(store, "a"),),)})
    with _prefetcher(control, store) as prefetcher:
        [step] = list(prefetcher)
    assert [key.attempt for key in step.trained] == [1]
    assert store.held_bytes == 0


def test_a_rank_that_does_not_reach_the_store_ends_instead_of_losing_samples():
    store = FlakyStore(num_refusals=100, capacity_bytes=1 << 20)
    control = Control(store, {1: ((_put(store, "a"),),)})
    with _prefetcher(control, store) as prefetcher, pytest.raises(StoreUnavailableError):
        list(prefetcher)


class StuckStore(MemoryStore):
    """Doesn't answer to the first releases."""

    num_refusals = 1

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.released = []

    def release(self, keys):
        self.released.append(tuple(keys))
        if self.num_refusals:
            self.num_refusals -= 1
            raise StoreUnavailableError("release", "it is away")
        super().release(keys)


def test_samples_that_could_not_be_freed_are_freed_with_the_next_step():
    store = StuckStore(capacity_bytes=1 << 20)
    refs = {step: _put(store, f"p{step}") for step in (1, 2, 3)}
    control = Control(store, {step: ((ref,),) for step, ref in refs.items()})
    with _prefetcher(control, store) as prefetcher:
        assert [step.step for step in prefetcher] == [1, 2, 3]
    first, second, third = (ref.key for ref in refs.values())
    assert store.released == [(first,), (first, second), (third,)]
    assert store.held_bytes == 0
    assert control.given_back == [(first,), (second,), (third,)]


def test_samples_of_the_last_step_that_could_not_be_freed_are_freed_at_the_end():
    store = StuckStore(capacity_bytes=1 << 20)
    ref = _put(store, "a")
    with _prefetcher(Control(store, {1: ((ref,),)}), store) as prefetcher:
        assert [step.trained for step in prefetcher] == [(ref.key,)]
        assert store.held_bytes == ref.num_bytes
    assert store.held_bytes == 0


def test_a_store_that_stays_away_costs_no_rank_its_life(caplog):
    store = StuckStore(capacity_bytes=1 << 20)
    store.num_refusals = 99
    control = Control(store, {step: ((_put(store, f"p{step}"),),) for step in (1, 2)})
    with _prefetcher(control, store) as prefetcher:
        assert [step.step for step in prefetcher] == [1, 2]
    assert "event=unreleased samples=2" in caplog.text


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

    lost = _put(store, "lost")
    store.release([lost.key])
    control = TellingControl(store, {1: ((_put(store, "a"),),), 2: ((lost,),)})
    prefetcher = _prefetcher(control, store, prefetch_steps=9)
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
    kept, lost = _put(store, "kept"), _put(store, "lost")
    store.release([lost.key])
    control = Control(store, {1: ((kept,), (lost,))}, rejects=True)
    with _prefetcher(control, store) as prefetcher:
        [step] = list(prefetcher)
    assert step.trained == (kept.key,)
    assert step.num_tokens == 3
    [failure] = step.rejected
    assert (failure.key.prompt_id, failure.reason) == ("lost", "gone")
    assert [batch.num_tokens for batch in step.batches] == [3, 1]
    assert not step.batches[1].loss_mask_T.any()


def test_a_sample_that_is_lost_for_good_leaves_no_gap_among_its_neighbours(store):
    first, lost, last = _put(store, "a", 3, 1), _put(store, "b", 2, 2), _put(store, "c", 4, 3)
    store.release([lost.key])
    control = Control(store, {1: ((first, lost, last),)}, rejects=True)
    with _prefetcher(control, store) as prefetcher:
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
    control = FailingControl(store, {1: ((_put(store, "a"),),)})
    with _prefetcher(control, store) as prefetcher:
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
    control = SlowControl(store, {step: ((_put(store, f"p{step}"),),) for step in (1, 2, 3)})
    with _prefetcher(control, store) as prefetcher:
        waits = {}
        for step in prefetcher:
            waits[step.step] = step.wait_s
            if step.step == 2:
                assert control.wait_until_asked(4)
    assert 0.1 < waits[2] < WAIT_S
    assert waits[3] < 0.05


def test_leaving_early_ends_the_thread(store):
    control = Control(store, {step: ((_put(store, f"p{step}"),),) for step in range(1, 9)})
    with _prefetcher(control, store, prefetch_steps=1) as prefetcher:
        next(iter(prefetcher))
        assert "prefetch" in {thread.name for thread in threading.enumerate()}
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}
    assert store.held_bytes > 0
