"""What one start of a run's trainers asked for stays away from the next."""

import threading

import pytest
import torch

from torchspec_lib.errors import EngineError, SampleLostError
from torchspec_lib.inference.start_fence import StartFence
from torchspec_lib.transfer.memory import MemoryStore
from torchspec_lib.types import SampleKey, start_id


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(1 << 20)


def put(store: MemoryStore, start: int):
    key = SampleKey.first(start_id("run", start), 0, "p0")
    return store.put(key, {"input_ids": torch.arange(4, dtype=torch.int32)})


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("start", [2, 3])
def test_a_new_start_frees_what_those_before_left_and_nothing_else(store, start, restarted):
    """A start whose trainers didn't come up is one that no engine hears of."""
    fence = StartFence(store, "run")
    with fence.capturing(1, []):
        left, new, foreign = put(store, 1), put(store, start), put(store, 11)
    if restarted:
        fence = StartFence(store, "run")
    with fence.capturing(start, []):
        pass
    with pytest.raises(SampleLostError):
        store.get(left, torch.device("cpu"))
    for kept in (new, foreign):
        store.get(kept, torch.device("cpu"))


def test_a_call_for_an_older_start_is_refused(store):
    fence = StartFence(store, "run")
    for _ in range(2):
        with fence.capturing(2, []):
            pass
    refused = pytest.raises(EngineError, match="start 2 and not for 1")
    with refused, fence.capturing(1, []):
        pass


def test_a_new_start_frees_what_a_call_of_the_one_before_is_only_just_capturing(store):
    fence = StartFence(store, "run")
    key = SampleKey.first(start_id("run", 1), 0, "p0")
    tensors = {"input_ids": torch.arange(4, dtype=torch.int32)}

    def capture_for_the_next() -> None:
        with fence.capturing(2, []):
            pass

    new = threading.Thread(target=capture_for_the_next)
    with fence.capturing(1, [key]):
        new.start()
        new.join(0.1)
        left = store.put(key, tensors)
    new.join(10)
    with pytest.raises(SampleLostError):
        store.get(left, torch.device("cpu"))


def test_a_sample_that_is_being_captured_is_discarded_only_afterwards(store):
    fence = StartFence(store, "run")
    key = SampleKey.first("run", 0, "p0")
    order: list[str] = []

    def discard() -> None:
        fence.wait_for([key])
        order.append("discarded")

    waiting = threading.Thread(target=discard)
    with fence.capturing(1, [key]):
        waiting.start()
        waiting.join(0.1)
        order.append("captured")
    waiting.join(10)
    assert order == ["captured", "discarded"]
