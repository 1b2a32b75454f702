"""What every store promises about its room. One suite, run on each."""

import threading
import time

import pytest

from tests.contract.stores import (
    CAPACITY_BYTES,
    CPU,
    HOST,
    MIB,
    PUT_TIMEOUT_S,
    Subject,
    new_key,
    sample,
)
from torchspec_lib.errors import StoreFullError
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.mooncake.processes import allocated_bytes, evicted_keys
from torchspec_lib.transfer.store import TensorStore
from torchspec_lib.types import SampleKey


def test_a_cleared_run_gives_back_all_its_room(subject: Subject):
    for _ in range(3):
        for _ in range(5):
            subject.store.put(new_key(), sample(4 * MIB))
        subject.store.clear("run")
    if subject.address is not None:
        assert allocated_bytes(subject.address.metrics) == 0


def test_a_full_store_refuses_and_keeps_everything_it_has(subject: Subject):
    store, refs = subject.store, []
    with pytest.raises(StoreFullError, match="no room for run/"):  # noqa: PT012 - at some point
        for i in range(100):
            refs.append(store.put(new_key(), sample(2 * MIB, value=i)))
    assert len(refs) >= 8
    for i, ref in enumerate(refs):
        assert (store.get(ref, CPU)["x"] == i).all()
    if subject.address is not None:
        assert evicted_keys(subject.address.metrics) == 0
    store.release([ref.key for ref in refs[:2]])
    again = store.put(new_key(), sample(2 * MIB, value=-1))
    assert (store.get(again, CPU)["x"] == -1).all()
    store.release([ref.key for ref in [*refs, again]])


def test_a_put_into_a_store_that_others_fill_waits_for_room_as_long_as_told(subject: Subject):
    if subject.address is None:
        pytest.skip("memory is this process's own")
    other = connect(subject.address, HOST, owns_memory=False, put_timeout_s=0.0)
    foreign = []
    with pytest.raises(StoreFullError):  # noqa: PT012 - at some point
        while True:
            foreign.append(other.put(SampleKey.first("other", 0, "p"), sample(4 * MIB)))
    start = time.monotonic()
    with pytest.raises(StoreFullError, match="no room for run/"):
        subject.store.put(new_key(), sample(4 * MIB))
    assert PUT_TIMEOUT_S <= time.monotonic() - start < PUT_TIMEOUT_S + 2
    threading.Timer(PUT_TIMEOUT_S / 2, other.release, [[foreign[0].key]]).start()
    ref = subject.store.put(new_key(), sample(4 * MIB, value=5))
    assert (subject.store.get(ref, CPU)["x"] == 5).all()
    subject.store.release([ref.key])
    other.clear("other")
    other.close()
    assert allocated_bytes(subject.address.metrics) == 0


def test_a_sample_larger_than_the_store_is_refused(store: TensorStore):
    with pytest.raises(StoreFullError, match="no room"):
        store.put(new_key(), sample(CAPACITY_BYTES + MIB))


def test_released_samples_give_back_all_their_room(subject: Subject):
    for _ in range(3):
        refs = [subject.store.put(new_key(), sample(4 * MIB)) for _ in range(5)]
        subject.store.release([ref.key for ref in refs])
    if subject.address is not None:
        assert allocated_bytes(subject.address.metrics) == 0
