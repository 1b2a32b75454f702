"""The store between engines and trainers, as both sides see it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from torchspec_lib.types import SampleKey, SampleRef


class TensorStore(Protocol):
    """Keeps samples from capture to training. One packed object per sample.

    A sample that nobody has released is never evicted. Safe to call from several threads.
    """

    def put(self, key: SampleKey, tensors: Mapping[str, torch.Tensor]) -> SampleRef:
        """Store ``tensors`` [T, ...], all or none; they can be read when this returns.

        ``num_tokens`` of the reference is the first dimension, which all tensors share.

        Raises:
            ValueError: The key is taken: every attempt has its own.
            StoreFullError: There is no room, even after waiting.
            StoreUnavailableError: The store didn't answer; try again under another key.
        """
        ...

    def get(self, ref: SampleRef, device: torch.device) -> dict[str, torch.Tensor]:
        """The sample's tensors, bit for bit; they belong to the reader.

        Raises:
            SampleLostError: It isn't there, or isn't whole.
            StoreUnavailableError: The store didn't answer.
        """
        ...

    def borrow(self, ref: SampleRef) -> AbstractContextManager[Mapping[str, torch.Tensor]]:
        """The sample's tensors where they lie in host memory, uncopied, until the context ends.

        They are to be read only. A reader holds one sample at a time, copies what it keeps and
        doesn't close the store meanwhile: the memory is one of few buffers, which puts and other
        reads of this process need too.

        Raises:
            SampleLostError: It isn't there, or isn't whole.
            StoreUnavailableError: The store didn't answer.
        """
        ...

    def release(self, keys: Sequence[SampleKey]) -> None:
        """Free samples. Only who has finished reading calls it; absent keys are fine."""
        ...

    def clear(self, run_id: str) -> None:
        """Free every sample of a run. For when nobody reads or writes one any more."""
        ...

    def close(self) -> None:
        """Leave the store. Later calls raise ``StoreUnavailableError``; closing again is fine."""
        ...


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Everything an actor needs to attach to the run's store."""

    run_id: str
    mode: str
    """``client_process`` or ``embedded``, as ``transfer.mode``."""
    protocol: str
    device_name: str
    master: str
    """``ip:port`` of the master's RPC."""
    metrics: str
    """``ip:port`` of the master's HTTP metrics."""
    clients: Mapping[str, str]
    """Node IP to ``ip:port`` of that node's client process; empty in embedded mode."""
    segment_bytes: int
    """Memory that each owner contributes: a node's client process, or an engine."""
    max_sample_bytes: int
