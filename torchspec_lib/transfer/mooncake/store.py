"""The Mooncake store, as a ``TensorStore``.

Samples are packed into, and unpacked from, a few buffers that Mooncake knows.
"""

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from torchspec_lib.errors import SampleLostError, StoreFullError, StoreUnavailableError
from torchspec_lib.transfer.mooncake.layout import pack_into, packed_size, unpack
from torchspec_lib.transfer.mooncake.library import muted_stderr
from torchspec_lib.types import SampleKey, SampleRef

PUT_TIMEOUT_S, RETRY_TIMEOUT_S = 60.0, 20.0
_TRANSFER_RETRY_S = 2.0
"""The owner of a sample that hung answers by then; one that died never does."""
_FIRST_WAIT_S, _WAIT_GROWTH, _LONGEST_WAIT_S = 0.01, 1.5, 0.25

_FULL, _INVALID, _NOT_READY, _NOT_FOUND, _LEASE_EXPIRED = -200, -600, -703, -704, -707
_TRANSFER_FAILED, _CHECKSUM, _RPC_FAILED, _RPC_TIMEOUT = -800, -801, -900, -901
_LOST = {_NOT_READY, _NOT_FOUND, _LEASE_EXPIRED, _TRANSFER_FAILED, _CHECKSUM}
_NO_ANSWER = {_INVALID, _RPC_FAILED, _RPC_TIMEOUT}
"""The master is away, or (invalid) a restarted client process doesn't know us again yet."""


class MooncakeStore:
    """A ``TensorStore`` on Mooncake. Make it with ``connect``.

    A put into a full store waits; a question that isn't answered is asked again for a while.
    """

    def __init__(
        self,
        client: Any,
        buffers: Sequence[torch.Tensor],
        capacity_bytes: int,
        config: Any,
        put_timeout_s: float = PUT_TIMEOUT_S,
        retry_timeout_s: float = RETRY_TIMEOUT_S,
    ) -> None:
        """``client`` is connected and knows ``buffers`` uint8; ``config`` goes with its puts."""
        self._client, self._config = client, config
        self._capacity_bytes = capacity_bytes
        self._largest_bytes = min(capacity_bytes, *(len(buffer) for buffer in buffers))
        self._put_timeout_s = put_timeout_s
        self._until_answered = dict.fromkeys(_NO_ANSWER, retry_timeout_s)
        self._free_buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for buffer in buffers:
            self._free_buffers.put(buffer)
        self._doubtful: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._calls = threading.Condition()
        self._num_calls = 0

    def put(self, key: SampleKey, tensors: Mapping[str, torch.Tensor]) -> SampleRef:
        """See ``TensorStore.put``. A key that is taken is a ``ValueError``."""
        with self._call("put"):
            num_bytes = packed_size(tensors)
            if num_bytes > self._largest_bytes:
                raise StoreFullError(str(key), num_bytes, self._largest_bytes)
            self._check_unused(key)
            self._remove_doubtful()
            with self._buffer() as buffer:
                ref = pack_into(buffer, key, tensors)
                self._put_packed(ref, buffer)
            return ref

    def _check_unused(self, key: SampleKey) -> None:
        """Mooncake itself would keep the old sample, and call that a success."""
        code = self._ask(lambda: self._client.is_exist(str(key)), self._until_answered)
        if code < 0:
            raise unavailable(f"put of {key}", code)
        if code > 0:
            raise ValueError(f"key {key} is taken: every put needs a key of its own")

    def _put_packed(self, ref: SampleRef, buffer: torch.Tensor) -> None:
        key, patience = str(ref.key), {_FULL: self._put_timeout_s}
        patience[_INVALID] = self._until_answered[_INVALID]
        code = self._ask(
            lambda: self._client.put_from(key, buffer.data_ptr(), ref.num_bytes, self._config),
            patience,
        )
        if code == _FULL:
            raise StoreFullError(key, ref.num_bytes, self._capacity_bytes)
        if code == 0:
            code = self._client.get_size(key)
            if code == ref.num_bytes:
                return
        # Whatever lies there would never be read nor freed: a retry goes under another key.
        self._doubtful.put(key)
        if code not in _NO_ANSWER:
            self._remove_doubtful()
        raise unavailable(f"put of {key}", code)

    def _remove_doubtful(self) -> None:
        """Remove what failed puts left, now that the store answers.

        A process that hung may finish such a put later still; ``clear`` frees that. What a put
        has reserved and not filled can't be removed: the master takes it back by itself within
        two minutes.
        """
        keys = []
        while not self._doubtful.empty():
            keys.append(self._doubtful.get())
        if keys:
            codes = self._client.batch_remove(keys, True)
            for key, code in zip(keys, codes, strict=True):
                if code not in (0, _NOT_FOUND):
                    self._doubtful.put(key)

    def get(self, ref: SampleRef, device: torch.device) -> dict[str, torch.Tensor]:
        """See ``TensorStore.get``."""
        with self.borrow(ref) as borrowed:
            tensors = {name: view.to(device, copy=True) for name, view in borrowed.items()}
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            return tensors

    @contextmanager
    def borrow(self, ref: SampleRef) -> Iterator[Mapping[str, torch.Tensor]]:
        """See ``TensorStore.borrow``. The memory is one of the buffers."""
        key, patience = str(ref.key), {**self._until_answered, _TRANSFER_FAILED: _TRANSFER_RETRY_S}
        with self._call("get"), self._buffer() as buffer:
            code = self._ask(
                lambda: self._client.get_into(key, buffer.data_ptr(), len(buffer)), patience
            )
            if code in _LOST:
                raise SampleLostError(key, f"Mooncake's code is {code}")
            if code < 0:
                raise unavailable(f"get of {key}", code)
            yield unpack(buffer[:code], ref)

    def release(self, keys: Sequence[SampleKey]) -> None:
        """See ``TensorStore.release``."""
        names = [str(key) for key in keys]

        def remove() -> int:
            codes = self._client.batch_remove(names, True) if names else []
            return min((code for code in codes if code not in (_NOT_FOUND, _NOT_READY)), default=0)

        with self._call("release"):
            code = self._ask(remove, self._until_answered)
            if code != 0:
                raise unavailable(f"release of {len(keys)} samples", code)

    def clear(self, run_id: str) -> None:
        """See ``TensorStore.clear``. Puts that their writers gave up on are among the samples."""
        pattern = f"^{re.escape(run_id)}/"
        with self._call("clear"):
            code = self._ask(
                lambda: self._client.remove_by_regex(pattern, True), self._until_answered
            )
            if code < 0:
                raise unavailable(f"clear of {run_id}", code)

    def close(self) -> None:
        """See ``TensorStore.close``. Waits for the calls of other threads, ends those that wait."""
        with self._calls:
            if self._closing.is_set():
                return
            self._closing.set()
            self._calls.wait_for(lambda: self._num_calls == 0)
        with muted_stderr():
            self._client.close()

    @contextmanager
    def _call(self, operation: str) -> Iterator[None]:
        """Keeps the client open: a call on a closed one would end this process."""
        with self._calls:
            if self._closing.is_set():
                raise StoreUnavailableError(operation, "it is closed")
            self._num_calls += 1
        try:
            yield
        finally:
            with self._calls:
                self._num_calls -= 1
                self._calls.notify_all()

    @contextmanager
    def _buffer(self) -> Iterator[torch.Tensor]:
        buffer = self._free_buffers.get()
        try:
            yield buffer
        finally:
            self._free_buffers.put(buffer)

    def _ask(self, request: Callable[[], int], patience: Mapping[int, float]) -> int:
        """Make a request, and repeat it for ``patience[code]`` seconds while it gives ``code``."""
        start, wait_s = time.monotonic(), _FIRST_WAIT_S
        while True:
            code = request()
            if time.monotonic() - start >= patience.get(code, 0.0):
                return code
            if self._closing.wait(wait_s):
                raise StoreUnavailableError("a waiting call", "it is being closed")
            wait_s = min(wait_s * _WAIT_GROWTH, _LONGEST_WAIT_S)


def unavailable(operation: str, code: int) -> StoreUnavailableError:
    """The error for a code that Mooncake gave."""
    return StoreUnavailableError(operation, f"Mooncake's code is {code}")
