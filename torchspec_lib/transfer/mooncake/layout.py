"""How a sample lies in the store: one packed object, whole or recognisably not.

A 64-byte header (magic, version, bytes of the table and of the payload, stamp), a JSON table
(each tensor's name, dtype, shape and offset in the payload), the payload with the tensors at
multiples of 64 bytes, and the stamp again as a 16-byte trailer. The stamp is a hash of the key,
which is never used twice: bytes of another sample, or of two objects mixed by a removal during
a read, don't pass for the one asked for.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torchspec_lib.errors import SampleLostError
from torchspec_lib.transfer.specs import DTYPES, describe
from torchspec_lib.types import SampleKey, SampleRef, TensorSpec

ALIGNMENT = 64
_MAGIC, _VERSION = b"TSSAMPLE", 1
_HEADER = struct.Struct("<8sIIQ16s24x")
_STAMP_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Frame:
    """Everything of a packed sample but the tensors' bytes; follows from key and specs."""

    head: bytes
    """Header and table."""
    offsets: Mapping[str, int]
    stamp: bytes
    num_bytes: int

    @classmethod
    def of(cls, key: SampleKey, specs: Mapping[str, TensorSpec]) -> "_Frame":
        relative, payload_bytes = {}, 0
        for name, spec in specs.items():
            relative[name] = payload_bytes
            payload_bytes = _aligned(payload_bytes + _num_bytes(spec))
        table = _table(specs, relative)
        start = _aligned(_HEADER.size + len(table))
        num_bytes = start + payload_bytes + _STAMP_BYTES
        stamp = hashlib.blake2b(str(key).encode(), digest_size=_STAMP_BYTES).digest()
        head = _HEADER.pack(_MAGIC, _VERSION, len(table), payload_bytes, stamp) + table
        offsets = {name: start + offset for name, offset in relative.items()}
        return cls(head, offsets, stamp, num_bytes)


def packed_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that ``tensors`` take when packed."""
    return _Frame.of(_ANY_KEY, describe(tensors)[1]).num_bytes


def pack_into(
    buffer: torch.Tensor, key: SampleKey, tensors: Mapping[str, torch.Tensor]
) -> SampleRef:
    """Pack ``tensors`` [T, ...] into ``buffer`` uint8 [at least ``packed_size(tensors)``].

    Any strides and device; ``buffer`` is host memory, aligned to 64 bytes.
    """
    num_tokens, specs = describe(tensors)
    frame = _Frame.of(key, specs)
    _write(buffer, 0, frame.head)
    for name, view in _views(buffer, specs, frame.offsets).items():
        view.copy_(tensors[name])
    _write(buffer, frame.num_bytes - _STAMP_BYTES, frame.stamp)
    return SampleRef(key, frame.num_bytes, num_tokens, specs)


def unpack(buffer: torch.Tensor, ref: SampleRef) -> dict[str, torch.Tensor]:
    """The tensors of ``ref``, as views into ``buffer`` uint8 [ref.num_bytes].

    Raises:
        SampleLostError: ``buffer`` holds something else, or a mixture.
    """
    frame = _Frame.of(ref.key, ref.tensors)
    if not len(buffer) == ref.num_bytes == frame.num_bytes:
        raise SampleLostError(str(ref.key), f"{len(buffer)} bytes came, not {ref.num_bytes}")
    head, trailer = buffer[: len(frame.head)], buffer[-_STAMP_BYTES:]
    if bytes(head.numpy()) != frame.head or bytes(trailer.numpy()) != frame.stamp:
        raise SampleLostError(str(ref.key), "its header or trailer is another object's")
    return _views(buffer, ref.tensors, frame.offsets)


_ANY_KEY = SampleKey("", 0, "", 0, "")
"""A packed sample's size doesn't depend on its key."""


def _table(specs: Mapping[str, TensorSpec], offsets: Mapping[str, int]) -> bytes:
    rows = [
        {"name": name, "dtype": spec.dtype, "shape": spec.shape, "offset": offsets[name]}
        for name, spec in specs.items()
    ]
    return json.dumps(rows, separators=(",", ":")).encode()


def _views(
    buffer: torch.Tensor, specs: Mapping[str, TensorSpec], offsets: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    return {
        name: buffer[offsets[name] : offsets[name] + _num_bytes(spec)]
        .view(DTYPES[spec.dtype])
        .view(spec.shape)
        for name, spec in specs.items()
    }


def _num_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPES[spec.dtype].itemsize


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _write(buffer: torch.Tensor, offset: int, content: bytes) -> None:
    buffer[offset : offset + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
