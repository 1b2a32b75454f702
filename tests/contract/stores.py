"""A store under test, and samples for it."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch

from torchspec_lib.transfer.store import StoreAddress, TensorStore
from torchspec_lib.types import SampleKey

CPU = torch.device("cpu")
HOST = "127.0.0.1"
MIB = 1 << 20
CAPACITY_BYTES = 32 * MIB
PUT_TIMEOUT_S = 0.3


@dataclass(frozen=True)
class Subject:
    """A store under test, and how to attach to it once more."""

    store: TensorStore
    reconnect: Callable[[], TensorStore]
    address: StoreAddress | None
    """None if other processes can't reach it."""


def new_key() -> SampleKey:
    return SampleKey.first("run", 0, secrets.token_hex(4))


def sample(num_bytes: int, value: int = 0) -> dict[str, torch.Tensor]:
    return {"x": torch.full((num_bytes // 4,), value, dtype=torch.int32)}
