"""A controller that hands out prepared steps, and the thread that fetches their samples."""

import threading
from dataclasses import dataclass, field

import torch

from torchspec_lib.models.batch import empty_batch
from torchspec_lib.training.prefetch import Prefetcher
from torchspec_lib.transfer.memory import MemoryStore
from torchspec_lib.types import CaptureFailure, SampleKey

HIDDEN, AUX = 4, 12
WAIT_S = 5.0


def tensors(num_tokens, fill):
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
        return self.store.put(key, tensors(ref.num_tokens, 7))

    def wait_until_asked(self, num_times):
        with self.changed:
            return self.changed.wait_for(lambda: len(self.asked) >= num_times, WAIT_S)


def put(store, name, num_tokens=3, fill=1):
    return store.put(SampleKey.first("run", 0, name), tensors(num_tokens, fill))


def prefetcher_of(control, store, prefetch_steps=2, first_step=1):
    return Prefetcher(
        control,
        store,
        rank=1,
        first_step=first_step,
        prefetch_steps=prefetch_steps,
        empty=empty_batch(AUX, HIDDEN, torch.float32),
        pin_memory=False,
    )
