"""What every store promises about its samples. One suite, run on each."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import pytest
import torch

from tests.contract.stores import CPU, HOST, Subject, new_key, sample
from torchspec_lib.errors import SampleLostError, StoreUnavailableError
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.store import StoreAddress, TensorStore
from torchspec_lib.types import SampleKey, SampleRef

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint8,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_comes_back_bit_for_bit(store: TensorStore, dtype: torch.dtype):
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (24, 36), dtype=torch.uint8)
    tensors = {
        "whole": content.to(dtype),
        "transposed": content.to(dtype).reshape(36, 24).t(),
        "strided": content.to(dtype)[:, ::2],
        "vector": content.to(dtype)[:, 3],
        "nothing": content.to(dtype)[:, :0],
    }
    ref = store.put(new_key(), tensors)
    back = store.get(ref, CPU)
    store.release([ref.key])
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name


def test_bits_that_are_no_number_survive(store: TensorStore):
    bits = torch.randint(-(2**15), 2**15, (100, 7), dtype=torch.int16)
    ref = store.put(new_key(), {"x": bits.view(torch.bfloat16)})
    assert torch.equal(store.get(ref, CPU)["x"].view(torch.int16), bits)
    store.release([ref.key])


def test_the_reference_tells_what_was_stored(store: TensorStore):
    key = new_key()
    ref = store.put(key, {"ids": torch.arange(9, dtype=torch.int32), "x": torch.zeros(9, 4)})
    store.release([key])
    assert (ref.key, ref.num_tokens) == (key, 9)
    assert ref.num_bytes >= 9 * 4 + 9 * 4 * 4
    assert {name: (spec.shape, spec.dtype) for name, spec in ref.tensors.items()} == {
        "ids": ((9,), "int32"),
        "x": ((9, 4), "float32"),
    }


def test_a_sample_belongs_to_its_reader(store: TensorStore):
    written = torch.zeros(4)
    ref = store.put(new_key(), {"x": written})
    written.fill_(5)
    first = store.get(ref, CPU)["x"]
    store.get(ref, CPU)["x"].fill_(7)
    other = store.put(new_key(), {"x": torch.ones(4)})
    store.get(other, CPU)
    store.release([ref.key, other.key])
    assert torch.equal(first, torch.zeros(4))


def test_a_borrowed_sample_stays_as_it_is_until_it_is_given_back(store: TensorStore):
    ref = store.put(new_key(), sample(1000, value=6))
    with store.borrow(ref) as borrowed:
        store.release([ref.key])
        others = [store.put(new_key(), sample(1000, value=i)) for i in range(6)]
        for other in others:
            store.get(other, CPU)
        assert list(borrowed) == ["x"]
        assert torch.equal(borrowed["x"], sample(1000, value=6)["x"])
    with pytest.raises(SampleLostError, match=str(ref.key)), store.borrow(ref):
        pass
    store.release([other.key for other in others])


def test_as_many_samples_can_be_borrowed_as_one_likes_one_after_the_other(store: TensorStore):
    ref = store.put(new_key(), sample(1000, value=2))
    for _ in range(10):
        with pytest.raises(KeyError), store.borrow(ref) as borrowed:
            borrowed["a reader's own mistake"]
    with store.borrow(ref) as borrowed:
        assert (borrowed["x"] == 2).all()
    store.release([ref.key])


def test_a_sample_may_be_read_twice_until_it_is_released(store: TensorStore):
    ref = store.put(new_key(), sample(1000, value=3))
    store.get(ref, CPU)
    assert (store.get(ref, CPU)["x"] == 3).all()
    store.release([ref.key])
    with pytest.raises(SampleLostError, match=str(ref.key)):
        store.get(ref, CPU)


def test_a_sample_that_was_never_put_is_lost(store: TensorStore):
    ref = store.put(new_key(), sample(1000))
    store.release([ref.key])
    absent = SampleRef(new_key(), ref.num_bytes, ref.num_tokens, ref.tensors)
    with pytest.raises(SampleLostError, match=str(absent.key)):
        store.get(absent, CPU)


def test_releasing_absent_samples_is_fine_and_doesnt_touch_others(store: TensorStore):
    ref = store.put(new_key(), sample(1000, value=4))
    gone = store.put(new_key(), sample(1000))
    store.release([gone.key])
    store.release([new_key(), gone.key])
    store.release([])
    assert (store.get(ref, CPU)["x"] == 4).all()
    store.release([ref.key])


def test_clearing_a_run_frees_all_its_samples_and_no_others(store: TensorStore):
    run = "run-1.2"
    others = ["run-1.21", "a-run-1.2", "run-1x2", "run"]
    keys = [SampleKey.first(run, epoch, "p") for epoch in range(3)]
    gone = [store.put(key, sample(1000)) for key in keys]
    kept = [store.put(SampleKey.first(other, 0, run), sample(1000, 7)) for other in others]
    store.clear(run)
    for ref in gone:
        with pytest.raises(SampleLostError):
            store.get(ref, CPU)
    for ref in kept:
        assert (store.get(ref, CPU)["x"] == 7).all()
    store.clear(run)
    again = store.put(SampleKey.first(run, 0, "p"), sample(1000, value=8))
    assert (store.get(again, CPU)["x"] == 8).all()
    store.release([ref.key for ref in [*kept, again]])


def test_a_key_is_never_put_twice(store: TensorStore):
    key = new_key()
    ref = store.put(key, sample(1000, value=1))
    with pytest.raises(ValueError, match=f"{key} is taken"):
        store.put(key, sample(1000, value=2))
    assert (store.get(ref, CPU)["x"] == 1).all()
    store.release([key])


def test_tensors_of_different_lengths_are_refused_and_leave_nothing(store: TensorStore):
    key = new_key()
    with pytest.raises(ValueError, match="first dimension"):
        store.put(key, {"a": torch.zeros(3), "b": torch.zeros(4)})
    ref = store.put(key, {"a": torch.zeros(3)})
    store.release([ref.key])


def test_several_threads_put_get_and_release_at_once(store: TensorStore):
    def work(thread: int) -> int:
        num_right = 0
        for i in range(20):
            value = thread * 1000 + i
            ref = store.put(new_key(), sample(200_000, value))
            num_right += int((store.get(ref, CPU)["x"] == value).all())
            store.release([ref.key])
        return num_right

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [20] * 8


def test_a_closed_store_refuses_every_call(subject: Subject):
    store = subject.reconnect()
    ref = subject.store.put(new_key(), sample(1000))
    store.close()
    store.close()
    for call in (
        lambda: store.put(new_key(), sample(1000)),
        lambda: store.get(ref, CPU),
        lambda: store.borrow(ref).__enter__(),
        lambda: store.release([ref.key]),
        lambda: store.release([]),
        lambda: store.clear("run"),
    ):
        with pytest.raises(StoreUnavailableError, match="closed"):
            call()
    subject.store.release([ref.key])


def test_a_store_may_be_closed_while_others_use_it(subject: Subject):
    store, started, keys = subject.reconnect(), threading.Barrier(5), []

    def work() -> str:
        started.wait()
        while True:
            try:
                keys.append(new_key())
                store.get(store.put(keys[-1], sample(100_000)), CPU)
            except StoreUnavailableError as error:
                return str(error)

    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(work) for _ in range(4)]
        started.wait()
        store.close()
        assert all("closed" in end.result(timeout=30) for end in ends)
    subject.store.release(keys)


@pytest.mark.timeout(90)
def test_another_process_reads_and_releases_a_sample(subject: Subject):
    if subject.address is None:
        pytest.skip("memory is this process's own")
    here, there = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    reader = spawn.Process(target=_read_elsewhere, args=(subject.address, there), daemon=True)
    reader.start()
    tensors = {"x": torch.randn(3000, 300).bfloat16(), "mask": torch.arange(3000) % 3 == 0}
    ref = subject.store.put(new_key(), tensors)
    here.send(ref)
    assert here.poll(80)
    back: dict[str, list[int]] = here.recv()
    reader.join(10)
    assert reader.exitcode == 0
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).flatten()
        assert back[name] == [*raw.tolist()[:1000], int(raw.sum())]
    with pytest.raises(SampleLostError):
        subject.store.get(ref, CPU)


def _read_elsewhere(address: StoreAddress, pipe: Connection) -> None:
    store = connect(address, HOST, owns_memory=False)
    ref = pipe.recv()
    raws = {k: t.view(torch.uint8).flatten() for k, t in store.get(ref, CPU).items()}
    store.release([ref.key])
    pipe.send({name: [*raw.tolist()[:1000], int(raw.sum())] for name, raw in raws.items()})
    store.close()
