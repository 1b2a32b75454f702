"""What one start of a run's trainers asked for stays away from the next."""

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


def test_a_new_start_frees_what_the_one_before_left_and_nothing_else(store):
    fence = StartFence(store, "run")
    fence.enter(1)
    left, new, foreign = put(store, 1), put(store, 2), put(store, 11)
    fence.enter(2)
    with pytest.raises(SampleLostError):
        store.get(left, torch.device("cpu"))
    for kept in (new, foreign):
        store.get(kept, torch.device("cpu"))


def test_a_call_for_an_older_start_is_refused(store):
    fence = StartFence(store, "run")
    fence.enter(2)
    fence.enter(2)
    with pytest.raises(EngineError, match="start 2 and not for 1"):
        fence.enter(1)
