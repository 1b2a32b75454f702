"""Fetching while the store doesn't answer."""

import pytest

from tests.unit.prefetching import Control, prefetcher_of, put
from torchspec_lib.errors import StoreUnavailableError
from torchspec_lib.transfer.memory import MemoryStore


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
    control = Control(store, {1: ((put(store, "a"),),)})
    with prefetcher_of(control, store) as prefetcher:
        [step] = list(prefetcher)
    assert [key.attempt for key in step.trained] == [1]
    assert store.held_bytes == 0


def test_a_rank_that_does_not_reach_the_store_ends_instead_of_losing_samples():
    store = FlakyStore(num_refusals=100, capacity_bytes=1 << 20)
    control = Control(store, {1: ((put(store, "a"),),)})
    with prefetcher_of(control, store) as prefetcher, pytest.raises(StoreUnavailableError):
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
    refs = {step: put(store, f"p{step}") for step in (1, 2, 3)}
    control = Control(store, {step: ((ref,),) for step, ref in refs.items()})
    with prefetcher_of(control, store) as prefetcher:
        assert [step.step for step in prefetcher] == [1, 2, 3]
    first, second, third = (ref.key for ref in refs.values())
    assert store.released == [(first,), (first, second), (third,)]
    assert store.held_bytes == 0
    assert control.given_back == [(first,), (second,), (third,)]


def test_samples_of_the_last_step_that_could_not_be_freed_are_freed_at_the_end():
    store = StuckStore(capacity_bytes=1 << 20)
    ref = put(store, "a")
    with prefetcher_of(Control(store, {1: ((ref,),)}), store) as prefetcher:
        assert [step.trained for step in prefetcher] == [(ref.key,)]
        assert store.held_bytes == ref.num_bytes
    assert store.held_bytes == 0


def test_a_store_that_stays_away_costs_no_rank_its_life(caplog):
    store = StuckStore(capacity_bytes=1 << 20)
    store.num_refusals = 99
    control = Control(store, {step: ((put(store, f"p{step}"),),) for step in (1, 2)})
    with prefetcher_of(control, store) as prefetcher:
        assert [step.step for step in prefetcher] == [1, 2]
    assert "event=unreleased samples=2" in caplog.text
