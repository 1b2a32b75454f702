"""Training-time test (EAGLE-3, arXiv 2503.01840, section 3.2): the draft trained on its own chains.

Shapes: ``T`` tokens of a packed micro-batch, ``H`` hidden size, ``V`` target and ``Vd`` draft
vocabulary, ``K`` depths (ttt_steps), ``N`` rows with a loss. Chain i starts at position i: at
depth k it is fed token i+1+k and predicts token i+2+k; its teacher is the target's
distribution after token i+1+k.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchspec_lib.models.attention import ttt_attention
from torchspec_lib.models.batch import PackedBatch
from torchspec_lib.models.eagle3 import Eagle3Draft
from torchspec_lib.models.loss import soft_cross_entropy
from torchspec_lib.models.target_head import TargetHead


@dataclass(frozen=True, slots=True, eq=False)
class Supervision:
    """Which chains of a batch are supervised at which depth, and how much each weighs.

    Known before any forward, so that ranks can agree on the denominators ``weight_sums_K``.
    """

    supervised_KT: Tensor
    """bool: tokens i+2 .. i+2+k are all the assistant's. Only shrinks with depth."""
    rows: tuple[Tensor, ...]
    """Per depth, int64: the supervised chains whose teacher's argmax is a draft token."""
    row_weights: tuple[Tensor, ...]
    """Per depth, float64: weight of each row's loss."""
    weight_sums_K: Tensor
    """float64."""
    labels_T: Tensor
    """int64: draft id of the target's greedy choice after each token; -1 if it has none."""


@dataclass(frozen=True, slots=True, eq=False)
class DepthSums:
    """What a forward measured, as float64 sums that add up over micro-batches and ranks."""

    loss_K: Tensor
    """Weighted losses, in nats; over ``weight_sums_K`` it is each depth's mean."""
    chains_K: Tensor
    """Supervised chains that were right at every depth before k."""
    matches_K: Tensor
    """Those of ``chains_K`` that are right at depth k too. Outside the vocabulary is a miss."""


@torch.no_grad()
def supervision(
    batch: PackedBatch,
    head: TargetHead,
    target_ids_T: Tensor,
    ttt_steps: int,
    reduction: Literal["token", "sample"],
) -> Supervision:
    """Find the supervised chains of a batch, without running the draft.

    Args:
        batch: On the head's device.
        head: Knows which target ids the draft vocabulary holds.
        target_ids_T: The target's greedy next tokens, ``head.target_ids(last_states)``.
        ttt_steps: K.
        reduction: ``token``: every row weighs 1. ``sample``: the rows of a document weigh 1
            together at each depth, so that a long sample weighs as much as a short one.
    """
    labels_T = head.draft_ids_V[target_ids_T]
    supervised_KT = _supervised_chains(batch, ttt_steps)
    tokens_T = torch.arange(batch.num_tokens, device=labels_T.device)
    depths_K = torch.arange(ttt_steps, device=labels_T.device)
    teachers_KT = (tokens_T + 1 + depths_K[:, None]).clamp(max=batch.num_tokens - 1)
    has_loss_KT = supervised_KT & (labels_T[teachers_KT] >= 0)
    weights_KT = has_loss_KT.double()
    if reduction == "sample":
        documents_T = batch.documents_T
        counts_KD = weights_KT.new_zeros(ttt_steps, len(batch.doc_starts) - 1)
        counts_KD.index_add_(1, documents_T, weights_KT)
        weights_KT = weights_KT / counts_KD[:, documents_T].clamp(min=1)
    sizes = has_loss_KT.sum(-1).tolist()
    return Supervision(
        supervised_KT=supervised_KT,
        rows=has_loss_KT.nonzero()[:, 1].split(sizes),
        row_weights=weights_KT[has_loss_KT].split(sizes),
        weight_sums_K=weights_KT.sum(-1),
        labels_T=labels_T,
    )


def _supervised_chains(batch: PackedBatch, ttt_steps: int) -> Tensor:
    """[K, T], bool: every token that the chain has predicted by then is the assistant's.

    A token past the end of its document doesn't exist, and so never is.
    """
    last = batch.num_tokens - 1
    tokens_T = torch.arange(batch.num_tokens, device=batch.loss_mask_T.device)
    ends_T = batch.doc_ends_T
    alive_T = torch.ones_like(batch.loss_mask_T)
    depths = []
    for depth in range(ttt_steps):
        predicted_T = tokens_T + 2 + depth
        alive_T = alive_T & (predicted_T < ends_T) & batch.loss_mask_T[predicted_T.clamp(max=last)]
        depths.append(alive_T)
    return torch.stack(depths)


class _ChainKeys:
    """Keys and values of all depths so far, for every chain of a batch at once."""

    def __init__(self, doc_starts: tuple[int, ...], scale: float) -> None:
        self._doc_starts, self._scale = doc_starts, scale
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attend(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Add a depth, and attend from it."""
        self._keys.append(k_TGD)
        self._values.append(v_TGD)
        (k0, *later_k), (v0, *later_v) = self._keys, self._values
        return ttt_attention(q_TND, k0, v0, later_k, later_v, self._doc_starts, self._scale)


class _ChainCounts:
    """Counts the chains that are still right, depth by depth."""

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision
        self._right_T = torch.ones_like(supervision.supervised_KT[0])
        self.chains: list[Tensor] = []
        self.matches: list[Tensor] = []

    def add(self, depth: int, draft_ids_N: Tensor) -> None:
        """``draft_ids_N``: the draft's greedy choice in this depth's rows."""
        rows = self._supervision.rows[depth]
        hits_T = torch.zeros_like(self._right_T)
        hits_T[rows] = draft_ids_N == self._supervision.labels_T[rows + 1 + depth]
        chains_T = self._right_T & self._supervision.supervised_KT[depth]
        self._right_T = chains_T & hits_T
        self.chains.append(chains_T.sum())
        self.matches.append(self._right_T.sum())


class Eagle3Model(nn.Module):
    """The draft with its training-time test: what FSDP wraps, and the trainer calls."""

    def __init__(self, draft: Eagle3Draft, ttt_steps: int) -> None:
        super().__init__()
        self.draft = draft
        self.ttt_steps = ttt_steps

    def forward(
        self,
        batch: PackedBatch,
        head: TargetHead,
        supervision: Supervision,
        depth_scale_K: Tensor,
    ) -> tuple[Tensor, DepthSums]:
        """The batch's share of the loss: ``sum_k depth_scale_K[k] * (weighted sum of l_k)``.

        Without any supervised chain it is a zero whose backward gives every parameter a
        gradient of zeros, as FSDP's collectives need.

        Args:
            batch: Packed samples, on the parameters' device.
            head: The target's, on the same device.
            supervision: ``supervision(batch, ...)`` for the same ``ttt_steps``.
            depth_scale_K: Weight of a depth over the global sum of its row weights; finite,
                float32 or float64. FSDP must not cast it: ``cast_forward_inputs=False``.

        Raises:
            ValueError: Weights were cast to half precision on the way in.
        """
        if depth_scale_K.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"depth_scale_K came as {depth_scale_K.dtype}: pass float32 or float64, and set "
                "cast_forward_inputs=False in FSDP's MixedPrecisionPolicy"
            )
        num_tokens, first_rows = batch.num_tokens, supervision.rows[0]
        # Depth k's teacher is depth 0's, k positions on: the target's head runs once.
        teacher_NVd = head.teacher_logits(batch.last_states_TH[first_rows + 1])
        teacher_row_T = torch.zeros_like(batch.input_ids_T)
        teacher_row_T[first_rows] = torch.arange(len(first_rows), device=first_rows.device)
        # The rows of zeros stand for tokens past the end, which no supervised chain is fed.
        embeds = F.pad(head.embed(batch.input_ids_T), (0, 0, 0, self.ttt_steps))
        positions_T = batch.positions_T
        keys = _ChainKeys(batch.doc_starts, self.draft.attention_scale)
        counts = _ChainCounts(supervision)
        states_TH = self.draft.project(batch.aux_states_TA)
        losses = []
        for depth, rows in enumerate(supervision.rows):
            embeds_TH = embeds[1 + depth : 1 + depth + num_tokens]
            states_TH = self.draft.layer(embeds_TH, states_TH, positions_T + depth, keys.attend)
            logits_NVd = self.draft.logits(states_TH[rows])
            loss_N = soft_cross_entropy(logits_NVd, teacher_NVd[teacher_row_T[rows + depth]])
            losses.append((supervision.row_weights[depth] * loss_N).sum())
            counts.add(depth, logits_NVd.argmax(-1))
        loss_K = torch.stack(losses)
        sums = DepthSums(
            loss_K.detach(),
            torch.stack(counts.chains).double(),
            torch.stack(counts.matches).double(),
        )
        return (depth_scale_K * loss_K).sum(), sums
