"""Training-time test (EAGLE-3, arXiv 2503.01840, section 3.2): the draft trained on its own chains.

Shapes: ``T`` tokens of a packed micro-batch, ``C`` chains (``models.chains``), ``H`` hidden size,
``Vd`` draft vocabulary, ``K`` depths (ttt_steps). At depth k chain i is fed token i+1+k and
predicts token i+2+k; its teacher is the target's distribution after token i+1+k.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from torchspec_lib.config.training import FORWARD_KL, LossName
from torchspec_lib.models.batch import PackedBatch
from torchspec_lib.models.eagle3 import Eagle3Draft
from torchspec_lib.models.head_loss import HeadLoss, head_loss
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.models.training_layer import TrainingLayer


@dataclass(frozen=True, slots=True, eq=False)
class Supervision:
    """Which chains of a batch are supervised at which depth, and how much each weighs.

    Known before any forward, so that ranks can agree on the denominators ``weight_sums_K``.
    """

    supervised_KC: Tensor
    """bool: tokens i+2 .. i+2+k are all the assistant's. Only shrinks with depth."""
    weights_KC: Tensor
    """float64: of each chain's loss; 0 where it isn't supervised, or its teacher's choice lies
    outside the draft vocabulary."""
    weight_sums_K: Tensor
    """float64."""


@dataclass(frozen=True, slots=True, eq=False)
class DepthSums:
    """What a forward measured, as float64 sums that add up over micro-batches and ranks."""

    loss_K: Tensor
    """Weighted losses; over ``weight_sums_K`` it is each depth's mean."""
    chains_K: Tensor
    """Supervised chains that were right at every depth before k."""
    matches_K: Tensor
    """Those of ``chains_K`` that are right at depth k too. Outside the vocabulary is a miss."""


@torch.no_grad()
def supervise(
    batch: PackedBatch,
    head: TargetHead,
    ttt_steps: int,
    reduction: Literal["token", "sample"],
) -> Supervision:
    """Find the supervised chains of a batch, without running the draft or waiting for the device.

    Args:
        batch: On the head's device.
        head: Knows which of the target's choices the draft vocabulary holds.
        ttt_steps: K.
        reduction: ``token``: every loss weighs 1. ``sample``: the losses of a document weigh 1
            together at each depth, so that a long sample weighs as much as a short one.
    """
    chains = batch.chains
    depths_K = torch.arange(ttt_steps, device=chains.lives_C.device)
    supervised_KC = chains.lives_C > depths_K[:, None]
    after_C = _teacher_positions(batch, 1)
    in_vocab_C = head.knows_choices(batch.last_states_TH[after_C])
    weights_KC = (supervised_KC & _shifted(in_vocab_C, ttt_steps)).double()
    if reduction == "sample":
        counts_KD = weights_KC.new_zeros(ttt_steps, len(batch.doc_starts) - 1)
        counts_KD.index_add_(1, chains.documents_C, weights_KC)
        weights_KC = weights_KC / counts_KD[:, chains.documents_C].clamp(min=1)
    return Supervision(supervised_KC, weights_KC, weights_KC.sum(-1))


def _teacher_positions(batch: PackedBatch, ttt_steps: int) -> Tensor:
    """[C + K - 1]: after which token the teacher of chain c at depth k speaks is in row c + k."""
    positions = batch.chains.extended(ttt_steps - 1) + 1
    return positions.clamp(max=batch.num_tokens - 1)  # a placeholder may be the only token


def _shifted(rows: Tensor, ttt_steps: int) -> Tensor:
    """[K, C]: row c + k at [k, c]; false or 0 past the end, where no chain is supervised."""
    padded = torch.cat([rows, rows.new_zeros(ttt_steps - 1)])
    return padded.unfold(0, len(rows), 1)


class Eagle3Model(nn.Module):
    """The draft with its training-time test: what FSDP wraps, and the trainer calls."""

    def __init__(
        self, draft: Eagle3Draft, ttt_steps: int, loss: Mapping[LossName, float] = FORWARD_KL
    ) -> None:
        """``loss``: weight of each of ``models.losses``."""
        super().__init__()
        self.draft, self.ttt_steps, self._loss = draft, ttt_steps, loss

    def forward(
        self,
        batch: PackedBatch,
        head: TargetHead,
        supervision: Supervision,
        depth_scale_K: Tensor,
    ) -> tuple[Tensor, DepthSums]:
        """The batch's share of the loss: ``sum_k depth_scale_K[k] * (weighted sum of l_k)``.

        Without any supervised chain it is a zero whose backward gives every parameter a
        gradient of zeros, as FSDP's collectives need. Never waits for the device.

        Args:
            batch: Packed samples, on the parameters' device.
            head: The target's, on the same device.
            supervision: ``supervise(batch, ...)`` for the same ``ttt_steps``.
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
        # Depth k's teacher is depth 0's, k rows on: the target's head runs once.
        teachers = _teacher_positions(batch, self.ttt_steps)
        teacher_Vd = head.teacher_logits(batch.last_states_TH[teachers])
        said = head_loss(
            self._states(batch, head),
            self.draft.lm_head.weight,
            teacher_Vd,
            depth_scale_K[:, None] * supervision.weights_KC,
            self._loss,
        )
        return said.total, _sums(said, supervision, teacher_Vd.argmax(-1))

    def _states(self, batch: PackedBatch, head: TargetHead) -> list[Tensor]:
        """What the head reads at each depth, [C, H]."""
        draft = self.draft
        next_ids_T = batch.input_ids_T.roll(-1)  # a document's last position has no chain
        layer = TrainingLayer(draft, batch, head.embed(next_ids_T), self.ttt_steps)
        out_CH = layer.first(draft.project(batch.aux_states_TA))
        states = [draft.next_states(out_CH)]
        for depth in range(1, self.ttt_steps):
            states.append(draft.next_states(layer.later(depth, states[-1])))
        return [draft.head_input(state_CH) for state_CH in states]


def _sums(said: HeadLoss, supervision: Supervision, labels: Tensor) -> DepthSums:
    """``labels`` [C + K - 1]: the teachers' choices among the draft vocabulary."""
    supervised_KC, weights_KC = supervision.supervised_KC, supervision.weights_KC
    labels_KC = labels.unfold(0, supervised_KC.shape[1], 1)
    hits_KC = (said.draft_ids_KC == labels_KC) & (weights_KC > 0)
    right_KC = hits_KC.cumprod(0).bool()  # at this depth and all before
    alive_KC = torch.cat([supervised_KC[:1], supervised_KC[1:] & right_KC[:-1]])
    return DepthSums(
        loss_K=(weights_KC * said.losses_KC).sum(-1),
        chains_K=alive_KC.sum(-1).double(),
        matches_K=right_KC.sum(-1).double(),
    )
