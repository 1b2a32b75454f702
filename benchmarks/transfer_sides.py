"""The two ends of what ``transfer.py`` measures, each a process of its own as in a run."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import numpy as np
import ray
import torch

from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.mooncake.store import MooncakeStore
from torchspec_lib.transfer.store import StoreAddress
from torchspec_lib.types import SampleKey

HOST = "127.0.0.1"
HIDDEN = 1024
BYTES_PER_TOKEN = 4 * HIDDEN * 2 + 4 + 1
NUM_WRITERS = 2
"""As many samples are put at a time as by an engine's scheduler."""
IN_FLIGHT = 3
"""Samples put and not yet released; as few as the largest leave room for."""

Tensors = dict[str, torch.Tensor]


def sample_in(memory: torch.Tensor, num_bytes: int) -> Tensors:
    """Views of ``memory`` uint8 in the shape of a sample of about ``num_bytes``."""
    num_tokens = num_bytes // BYTES_PER_TOKEN
    columns: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        ("aux_hidden_states", torch.bfloat16, (num_tokens, 3 * HIDDEN)),
        ("last_hidden_states", torch.bfloat16, (num_tokens, HIDDEN)),
        ("input_ids", torch.int32, (num_tokens,)),
        ("loss_mask", torch.bool, (num_tokens,)),
    ]
    tensors, start = {}, 0
    for name, dtype, shape in columns:
        end = start + dtype.itemsize * int(np.prod(shape))
        tensors[name] = memory[start:end].view(dtype).view(shape)
        start = end
    return tensors


class Side:
    """What both ends have: memory of the largest sample's size, and a store."""

    def __init__(self, largest: int) -> None:
        torch.set_num_threads(1)
        self._memory = torch.ones(largest, dtype=torch.uint8)
        self._store: MooncakeStore | None = None
        self._names = count()

    def attach(self, address: StoreAddress) -> None:
        """Leave the store and join the one at ``address``."""
        self.leave()
        self._store = connect(address, HOST, owns_memory=False)

    def leave(self) -> None:
        if self._store is not None:
            self._store.close()
        self._store = None

    @property
    def store(self) -> MooncakeStore:
        assert self._store is not None
        return self._store

    def _keys(self, num: int) -> Iterator[SampleKey]:
        """New ones; ``side`` keeps those of the two processes apart."""
        for _ in range(num):
            yield SampleKey.first("run", 0, f"{type(self).__name__}-{next(self._names)}")


class Writer(Side):
    """The engine's end."""

    def __init__(self, largest: int) -> None:
        super().__init__(largest)
        self._other = torch.ones(largest, dtype=torch.uint8)
        self._listener = Listener((HOST, 0))
        self._raw_listener = socket.create_server((HOST, 0))
        self._refs: Connection
        self._raw: socket.socket

    def ports(self) -> tuple[int, int]:
        address: Any = self._listener.address
        return address[1], self._raw_listener.getsockname()[1]

    def accept(self) -> None:
        self._refs = self._listener.accept()
        self._raw, _ = self._raw_listener.accept()

    def memcpy(self, num_bytes: int, num: int, num_threads: int) -> float:
        """Seconds to copy ``num`` times ``num_bytes``, shared out to threads."""
        share = num_bytes // num_threads
        parts = [slice(i * share, (i + 1) * share) for i in range(num_threads)]

        def copy(part: slice) -> None:
            for _ in range(num):
                self._other[part].copy_(self._memory[part])

        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(copy, parts))
            start = time.perf_counter()
            list(pool.map(copy, parts))
            return time.perf_counter() - start

    def put(self, num_bytes: int, num: int, held: int) -> float:
        """Seconds for ``num`` puts of which ``held`` lie in the store at a time."""
        sample, seconds, keys = sample_in(self._memory, num_bytes), 0.0, list(self._keys(num))
        for i, key in enumerate(keys):
            start = time.perf_counter()
            self.store.put(key, sample)
            seconds += time.perf_counter() - start
            if i + 1 >= held:
                self.store.release([keys[i + 1 - held]])
        self.store.release(keys)
        return seconds

    def send(self, num_bytes: int, num: int) -> float:
        """Seconds until ``num`` samples have gone through the store to the reader's memory."""
        sample, room = sample_in(self._memory, num_bytes), threading.Semaphore(IN_FLIGHT)
        sending = threading.Lock()

        def put(key: SampleKey) -> None:
            ref = self.store.put(key, sample)
            with sending:
                self._refs.send(ref)

        def take_back() -> None:
            for _ in range(num):
                self._refs.recv()
                room.release()

        start = time.perf_counter()
        with ThreadPoolExecutor(NUM_WRITERS + 1) as pool:
            work = [pool.submit(take_back)]
            for key in self._keys(num):
                room.acquire()
                work.append(pool.submit(put, key))
            for each in work:
                each.result()
        return time.perf_counter() - start

    def send_raw(self, num_bytes: int, num: int) -> float:
        """Seconds until ``num`` times ``num_bytes`` have gone through a TCP connection."""
        payload = memoryview(self._memory.numpy())[:num_bytes]
        start = time.perf_counter()
        for _ in range(num):
            self._raw.sendall(payload)
        self._raw.recv(1)
        return time.perf_counter() - start

    def send_objects(self, num_bytes: int, num: int, reader: Any) -> float:
        """Seconds until ``num`` arrays have gone through Ray's object store."""
        array = self._memory.numpy()[:num_bytes]
        start = time.perf_counter()
        pending: list[Any] = []
        for _ in range(num):
            if len(pending) == IN_FLIGHT:
                ray.get(pending.pop(0))
            pending.append(reader.take.remote(ray.put(array)))
        ray.get(pending)
        return time.perf_counter() - start


class Reader(Side):
    """The trainer's end. Its memory stands for page-locked memory, which is used again too."""

    def dial(self, refs_port: int, raw_port: int) -> None:
        self._refs = Client((HOST, refs_port))
        self._raw = socket.create_connection((HOST, raw_port))

    def get(self, num_bytes: int, num: int) -> tuple[float, float]:
        """Seconds for borrowing a sample ``num`` times; and with copying it out."""
        [key] = self._keys(1)
        sample = sample_in(self._memory, num_bytes)
        ref = self.store.put(key, sample)
        start = time.perf_counter()
        for _ in range(num):
            with self.store.borrow(ref):
                pass
        borrowed = time.perf_counter()
        for _ in range(num):
            with self.store.borrow(ref) as views:
                _copy(views, sample)
        end = time.perf_counter()
        self.store.release([key])
        return borrowed - start, end - borrowed

    def receive(self, num_bytes: int, num: int) -> None:
        """Take ``num`` samples out of the store, as the prefetching thread does."""
        sample = sample_in(self._memory, num_bytes)
        for _ in range(num):
            ref = self._refs.recv()
            with self.store.borrow(ref) as views:
                _copy(views, sample)
            self.store.release([ref.key])
            self._refs.send(None)

    def receive_raw(self, num_bytes: int, num: int) -> None:
        memory = memoryview(self._memory.numpy())[:num_bytes]
        for _ in range(num):
            received = 0
            while received < num_bytes:
                received += self._raw.recv_into(memory[received:])
        self._raw.sendall(b"1")

    def take(self, array: np.ndarray[Any, Any]) -> None:
        """Copy what Ray maps into this process."""
        np.copyto(self._memory.numpy()[: len(array)], array)


def _copy(views: Any, sample: Tensors) -> None:
    for name, view in views.items():
        sample[name].copy_(view)
