"""FSDP2 for a draft: the process group, sharding or replication, and collectives that sum.

Gradients are summed over ranks, never averaged: the loss is divided once, by the counts of
the whole global batch, before its backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""For a rank whose peers wait while a lost sample of it is captured again."""

T = TypeVar("T")

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where ranks meet. Rank 0 listens; the system chooses the port, so nobody can take it."""

    host: str
    port: int
    store: dist.TCPStore

    @classmethod
    def listen(cls, host: str) -> Self:
        """Rank 0's; ``host`` is how the others reach it."""
        store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=RENDEZVOUS_TIMEOUT
        )
        return cls(host, store.port, store)

    @classmethod
    def connect(cls, host: str, port: int) -> Self:
        """Another rank's, to the address that rank 0 listens at."""
        store = dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=RENDEZVOUS_TIMEOUT
        )
        return cls(host, port, store)


def init_process_group(
    rendezvous: Rendezvous, rank: int, world_size: int, device: torch.device
) -> None:
    """Join the default process group: Gloo on the CPU, NCCL (and Gloo for objects) on GPUs."""
    dist.init_process_group(
        _BACKENDS[device.type],
        store=rendezvous.store,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Do ``work`` on every rank; what one of them raises is raised by all, and none waits alone.

    Args:
        work: Gives something that can be pickled.
        group: The default group if left out.

    Returns:
        Every rank's result, in the order of the ranks.
    """
    own: tuple[T | None, Exception | None]
    try:
        own = work(), None
    except Exception as error:  # noqa: BLE001 - raised on every rank
        own = None, error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, own, group=group)
    for _, raised in outcomes:
        if raised is not None:
            raise raised
    return [result for result, _ in outcomes]


def parallelize(
    model: nn.Module,
    device: torch.device,
    compute_dtype: torch.dtype,
    parallelism: Literal["shard", "replicate"] = "shard",
) -> None:
    """Bring a float32 model under FSDP, in place; every rank must hold the same weights.

    Parameters and their gradients stay float32, a forward computes in ``compute_dtype``.
    One group for the whole model: a draft's layer runs once per depth within one forward, and
    in a group of its own it would be gathered as often.

    Args:
        model: Moves to ``device``.
        device: This rank's.
        compute_dtype: Of matrix products.
        parallelism: Whether the ranks share the parameters, or each holds all of them.
    """
    model.to(device)
    num_ranks = dist.get_world_size()
    # FSDP shards over the last axis of its mesh, and replicates over the one before.
    mesh_shape = (num_ranks,) if parallelism == "shard" else (num_ranks, 1)
    names = ("shard",) if parallelism == "shard" else ("replicate", "shard")
    fully_shard(
        model,
        mesh=init_device_mesh(device.type, mesh_shape, mesh_dim_names=names),
        mp_policy=MixedPrecisionPolicy(
            param_dtype=compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # denominators and teachers keep their precision
        ),
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without it the factor becomes a pre-multiplied sum, which Gloo doesn't have.
            module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Whether the next backward reduces gradients, or keeps adding them up on this rank."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(sync)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``.

    Returns:
        The global L2 norm before clipping, a scalar; the same on every rank.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
