"""The training-time test's attention on a GPU: one kernel for all kinds of keys.

What its memory holds grows with the tokens alone: every key and value once, queries, outputs, and
a denominator for each softmax. Results don't differ from run to run.

Shapes: ``T`` tokens, ``C`` chains, ``N`` query heads, ``G`` key-value heads, ``D`` head size,
``K`` depths after depth 0 so far, ``B`` blocks of keys.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchspec_lib.models.attention_kernels import (
    dkv_kernel,
    dq_kernel,
    forward_kernel,
    own_backward_kernel,
)
from torchspec_lib.models.chains import Chains

_LOG2_E = math.log2(math.e)
"""Scores in base 2 take the GPU's own exponential."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows and keys of a block, warps, and blocks loaded ahead; found by trial on an H200."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class _TilesOf:
    """The kernels' tiles for one width of a head."""

    forward: Tiles
    grad_queries: Tiles
    grad_keys: Tiles


_NARROW = _TilesOf(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2))
_WIDE = _TilesOf(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 1))
_NARROW_BYTES = 256
"""Of a head: 128 numbers in bf16."""
_OWN_PAIRS, _OWN_WARPS = 8, 1
"""Rows times heads of a group that one program of the own keys' backward holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the chains are; int32, on the device."""

    positions_C: Tensor
    starts_C: Tensor
    ranges_B4: Tensor
    """For each block of keys: the rows that see some of its keys are [0] to [3], those that see
    all of them [1] to [2]."""

    @classmethod
    def of(cls, positions_C: Tensor, starts_C: Tensor, k_TGD: Tensor) -> "Layout":
        block = _tiles(k_TGD).grad_keys.keys
        first_B = torch.arange(0, len(k_TGD), block, device=positions_C.device)
        last_B = first_B + block - 1
        ranges = [
            torch.searchsorted(positions_C, first_B),
            torch.searchsorted(positions_C, last_B),
            torch.searchsorted(starts_C, first_B, right=True),
            torch.searchsorted(starts_C, last_B, right=True),
        ]
        return cls(positions_C.int(), starts_C.int(), torch.stack(ranges, 1).int())


def attention_forward(
    q_CND: Tensor,
    kv: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs [C, N, D] and log-denominators [N, C] (base 2, float32).

    Args:
        q_CND: Contiguous, as all tensors here.
        kv: Keys and values of depth 0, [T, G, D].
        own: Keys and values of the later depths so far, [K, C, G, D].
        layout: Where the chains are.
        scale: Factor of the scores.
    """
    num_rows, heads, _ = q_CND.shape
    out = torch.empty_like(q_CND)
    lse = torch.empty(heads, num_rows, dtype=torch.float32, device=q_CND.device)
    tiles = _tiles(q_CND).forward
    forward_kernel[_cdiv(num_rows, tiles.rows), heads](
        q_CND, *kv, *own, layout.positions_C, layout.starts_C, out, lse,
        num_rows, len(kv[0]), len(own[0]), scale * _LOG2_E,
        **_shape(q_CND, kv[0]), **_blocks(tiles), PRECISION=_precision(q_CND),
    )  # fmt: skip
    return out, lse


def attention_backward(
    dout_CND: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    kv: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    layout: Layout,
    scale: float,
) -> Tensor:
    """The gradient of q; adds those of ``kv`` and ``own`` to ``grads``, float32.

    Args:
        dout_CND: Of the outputs.
        saved: q, the outputs, and the log-denominators.
        kv: As in the forward.
        own: As in the forward.
        grads: Of ``kv``'s and ``own``'s tensors, in that order.
        layout: As in the forward.
        scale: As in the forward.
    """
    q, out, lse = saved
    num_rows, heads, _ = q.shape
    groups, num_keys = kv[0].shape[1], len(kv[0])
    dk, dv, down_k, down_v = grads
    delta = torch.empty_like(lse)
    dq_own = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    members = _power_of_2(heads // groups)
    rows = max(1, _OWN_PAIRS // members)
    shape = _shape(q, kv[0])
    own_backward_kernel[_cdiv(num_rows, rows), groups](
        q, *own, out, lse, dout_CND, delta, dq_own, down_k, down_v,
        num_rows, len(own[0]), scale, **shape, H_PAD=members, BR=rows, num_warps=_OWN_WARPS,
    )  # fmt: skip
    common, tiles = shape | {"PRECISION": _precision(q)}, _tiles(q)
    dkv_kernel[len(layout.ranges_B4), groups](
        q, *kv, layout.positions_C, layout.starts_C, lse, dout_CND, delta, layout.ranges_B4, dk, dv,
        num_rows, num_keys, scale, **common, **_blocks(tiles.grad_keys),
    )  # fmt: skip
    dq = torch.empty_like(q)
    dq_kernel[_cdiv(num_rows, tiles.grad_queries.rows), heads](
        q, *kv, layout.positions_C, layout.starts_C, lse, dout_CND, delta, dq_own, dq,
        num_rows, num_keys, scale, **common, **_blocks(tiles.grad_queries),
    )  # fmt: skip
    return dq


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(size: int) -> int:
    """The least that isn't below ``size``."""
    return 1 << (size - 1).bit_length()


def _shape(q_CND: Tensor, k_TGD: Tensor) -> dict[str, int]:
    _, heads, size = q_CND.shape
    padded = max(16, _power_of_2(size))
    return {"N": heads, "G": k_TGD.shape[1], "D": size, "D_PAD": padded}


def _tiles(heads: Tensor) -> _TilesOf:
    """For heads [rows, number, D]."""
    size = _power_of_2(heads.shape[-1])
    return _NARROW if size * heads.itemsize <= _NARROW_BYTES else _WIDE


def _blocks(tiles: Tiles) -> dict[str, Any]:
    return {
        "BM": tiles.rows,
        "BN": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _precision(q_CND: Tensor) -> str:
    """Matrix units round float32 to ten bits unless told otherwise."""
    return "ieee" if q_CND.dtype == torch.float32 else "tf32"


class FusedAttention:
    """Keys and values of one forward, each kept once, and their gradients, summed in float32.

    A depth's backward runs after those of all later depths, whose queries read its keys: by
    then their gradients are complete.
    """

    layout: Layout

    def __init__(self, chains: Chains, ttt_steps: int, scale: float) -> None:
        self.scale = scale
        self._chains, self._num_later = chains, ttt_steps - 1
        self._num_depths = 0
        self._first: list[Tensor] = []
        self._later: list[Tensor] = []
        self._grads: list[Tensor] = []

    def __call__(self, q_CND: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from the next depth: ``attention.ttt_attention``, whose memory is linear here.

        Args:
            q_CND: Rotated queries.
            k: Rotated keys of this depth: [T, G, D] at depth 0, then [C, G, D].
            v: Likewise.
        """
        out: Tensor = _Attend.apply(q_CND.contiguous(), k.contiguous(), v.contiguous(), self)  # type: ignore[no-untyped-call]
        return out

    def add(self, k: Tensor, v: Tensor) -> int:
        """Keep a depth's keys and values; gives the depth."""
        depth = self._num_depths
        if depth == 0:
            chains, self._first = self._chains, [k.detach(), v.detach()]
            self.layout = Layout.of(chains.positions_C, chains.starts_C, k)
            shape = (self._num_later, chains.num_chains, *k.shape[1:])
            self._later = [k.new_empty(shape), k.new_empty(shape)]
        else:
            for kept, new in zip(self._later, (k, v), strict=True):
                kept[depth - 1].copy_(new)
        self._num_depths += 1
        return depth

    def keys_at(self, depth: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Keys and values of depth 0, and those of the later depths up to this one."""
        (k0, v0), (own_k, own_v) = self._first, self._later
        return (k0, v0), (own_k[:depth], own_v[:depth])

    @property
    def grads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums so far, float32, of depth 0's keys and values and of the later depths'."""
        if not self._grads:
            kept = [*self._first, *self._later]
            self._grads = [torch.zeros_like(x, dtype=torch.float32) for x in kept]
        dk, dv, down_k, down_v = self._grads
        return dk, dv, down_k, down_v

    def take_grads(self, depth: int) -> tuple[Tensor, Tensor]:
        """Of this depth's keys and values, once its own backward is through."""
        dk, dv, down_k, down_v = self.grads
        if depth == 0:
            self._grads = []
            return dk, dv
        return down_k[depth - 1], down_v[depth - 1]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_CND: Tensor, k: Tensor, v: Tensor, keys: FusedAttention) -> Tensor:
        depth = keys.add(k, v)
        kv, own = keys.keys_at(depth)
        out, lse = attention_forward(q_CND, kv, own, keys.layout, keys.scale)
        ctx.save_for_backward(q_CND, out, lse)
        ctx.keys, ctx.depth = keys, depth
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        keys, depth = ctx.keys, ctx.depth
        q, out, lse = ctx.saved_tensors
        kv, own = keys.keys_at(depth)
        saved, grads = (q, out, lse), keys.grads
        dout = grad.contiguous()
        dq = attention_backward(dout, saved, kv, own, grads, keys.layout, keys.scale)
        dk, dv = keys.take_grads(depth)
        return dq, dk.to(q.dtype), dv.to(q.dtype), None
