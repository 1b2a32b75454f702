"""Which chains of a pack are trained: known from its loss masks alone, so on the host, ahead.

Chain i starts at position i: at depth k it is fed token i+1+k, and predicts token i+2+k. Only
chains that are supervised at depth 0 take part; the other positions give keys and nothing else.
A chain that is supervised at depth k is followed by supervised chains at i+1 .. i+k, so what
belongs to position i+k of chain number c (its token's embedding, its teacher) belongs at depth 0
to chain number c+k: every depth reads the same rows, shifted by k.

Shapes: ``T`` tokens of a pack, ``C`` chains, ``D`` documents.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """The chains of a pack, in the order of their positions; never none.

    A pack without supervision has a placeholder at position 0, whose ``lives_C`` is 0: so every
    parameter takes part in every forward, which FSDP's collectives need.
    """

    positions_C: Tensor
    """int64: where in the pack each chain starts."""
    starts_C: Tensor
    """int64: where in the pack its document starts."""
    documents_C: Tensor
    """int64: which document it belongs to, from 0."""
    lives_C: Tensor
    """int64: at how many depths it is supervised, however many are trained."""
    token_positions_T: Tensor
    """int64: position of every token of the pack in its document."""
    bounds: tuple[int, ...]
    """D + 1 entries: the first chain of each document, and C."""

    @property
    def num_chains(self) -> int:
        return self.bounds[-1]

    def extended(self, num_rows: int) -> Tensor:
        """Positions of the chains, the last one repeated ``num_rows`` times: [C + num_rows]."""
        return torch.cat([self.positions_C, self.positions_C[-1:].expand(num_rows)])

    def to(self, device: torch.device) -> Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        self._map(lambda tensor: recorded(tensor, stream))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            positions_C=change(self.positions_C),
            starts_C=change(self.starts_C),
            documents_C=change(self.documents_C),
            lives_C=change(self.lives_C),
            token_positions_T=change(self.token_positions_T),
        )


def recorded(tensor: Tensor, stream: torch.Stream) -> Tensor:
    """``tensor``, whose memory stays its own until ``stream``'s work before its end is through."""
    tensor.record_stream(stream)
    return tensor


def find_chains(loss_mask_T: Tensor, doc_starts: tuple[int, ...]) -> Chains:
    """The chains of a pack: position i has one where token i+2 is the assistant's.

    Args:
        loss_mask_T: bool, in host memory.
        doc_starts: Where each document starts, and T.
    """
    bounds = np.array(doc_starts)
    documents_T = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    lives_T = _lives(loss_mask_T.numpy(), bounds, documents_T)
    positions_C = lives_T.nonzero()[0]
    if not len(positions_C):
        positions_C = np.zeros(1, dtype=np.int64)
    documents_C = documents_T[positions_C]
    return Chains(
        positions_C=torch.from_numpy(positions_C),
        starts_C=torch.from_numpy(bounds[documents_C]),
        documents_C=torch.from_numpy(documents_C),
        lives_C=torch.from_numpy(lives_T[positions_C]),
        token_positions_T=torch.from_numpy(np.arange(bounds[-1]) - bounds[documents_T]),
        bounds=tuple(np.searchsorted(documents_C, np.arange(len(bounds))).tolist()),
    )


def _lives(
    mask_T: npt.NDArray[np.bool_], bounds: npt.NDArray[np.int64], documents_T: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """[T]: how many tokens from i+2 on are the assistant's without a gap, in i's document."""
    stops = np.union1d((~mask_T).nonzero()[0], bounds)
    predicted_T = np.arange(len(mask_T)) + 2
    # A prediction past the end of the pack stops where it starts, as one past a document's does.
    stop_T = stops[np.searchsorted(stops, predicted_T.clip(max=bounds[-1]))]
    lives_T = stop_T - predicted_T
    return np.where(predicted_T < bounds[documents_T + 1], lives_T, 0)
