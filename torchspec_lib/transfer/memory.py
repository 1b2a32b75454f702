"""The reference store: samples in this process's memory. For tests, and to say what is meant."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from torchspec_lib.errors import SampleLostError, StoreFullError, StoreUnavailableError
from torchspec_lib.transfer.specs import describe
from torchspec_lib.types import SampleKey, SampleRef


class MemoryStore:
    """A ``TensorStore`` of ``capacity_bytes``. Copies in and out; a full store refuses at once."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._samples: dict[SampleKey, dict[str, torch.Tensor]] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def held_bytes(self) -> int:
        """Bytes of all samples that were put and not released."""
        return sum(_num_bytes(sample) for sample in self._samples.values())

    def put(self, key: SampleKey, tensors: Mapping[str, torch.Tensor]) -> SampleRef:
        num_tokens, specs = describe(tensors)
        copy = {name: _copy(tensor, torch.device("cpu")) for name, tensor in tensors.items()}
        num_bytes = _num_bytes(copy)
        with self._lock:
            self._check_open("put")
            if key in self._samples:
                raise ValueError(f"key {key} is taken: every put needs a key of its own")
            if self.held_bytes + num_bytes > self._capacity_bytes:
                raise StoreFullError(str(key), num_bytes, self._capacity_bytes)
            self._samples[key] = copy
        return SampleRef(key, num_bytes, num_tokens, specs)

    def get(self, ref: SampleRef, device: torch.device) -> dict[str, torch.Tensor]:
        with self.borrow(ref) as tensors:
            return {name: _copy(tensor, device) for name, tensor in tensors.items()}

    @contextmanager
    def borrow(self, ref: SampleRef) -> Iterator[Mapping[str, torch.Tensor]]:
        with self._lock:
            self._check_open("get")
            if ref.key not in self._samples:
                raise SampleLostError(str(ref.key), "the store doesn't have it")
            sample = self._samples[ref.key]
        yield sample

    def release(self, keys: Sequence[SampleKey]) -> None:
        with self._lock:
            self._check_open("release")
            for key in keys:
                self._samples.pop(key, None)

    def clear(self, run_id: str) -> None:
        with self._lock:
            self._check_open("clear")
            self._samples = {k: s for k, s in self._samples.items() if k.run_id != run_id}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._samples.clear()

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise StoreUnavailableError(operation, "it is closed")


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)


def _num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
