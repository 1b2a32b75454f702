"""What a draft is trained to: how far its distribution q is from the target's p, row by row.

Every loss here is a function of two figures of a row, the soft cross entropy
``-sum_v p(v) log q(v)`` and the overlap ``sum_v min(p(v), q(v))``: the share of drawn tokens that
speculative sampling accepts (Leviathan et al. 2023, corollary 3.6). So a loss is known by its
value and by its derivatives in these two.

Shapes: ``R`` rows, ``Vd`` draft vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec_lib.config.training import LossName

LK_ETA = 3.0
"""How fast ``lk_hybrid`` turns from the cross entropy to the overlap; the paper's best."""

_LEAST_OVERLAP = 1e-6
"""Where ``lk_alpha`` stops growing."""


@dataclass(frozen=True, slots=True, eq=False)
class RowLosses:
    """Losses of rows, and what their gradients are made of; all [R]."""

    values_R: Tensor
    by_cross_entropy_R: Tensor
    by_overlap_R: Tensor


def mix(loss: Mapping[LossName, float], cross_entropy_R: Tensor, overlap_R: Tensor) -> RowLosses:
    """The weighted sum of losses.

    ``kl`` is the forward KL divergence but for the target's entropy, which has no gradient.
    ``tv`` is the total variation, one minus the overlap. ``lk_alpha`` and ``lk_hybrid`` are
    equations of Samarin et al. 2026 (LK losses, arXiv 2602.23881): the overlap's negative
    logarithm; and ``s * kl + (1 - s) * tv`` with ``s = exp(-eta * overlap)``, taken as a constant.

    Args:
        loss: Weight of each.
        cross_entropy_R: In nats.
        overlap_R: In [0, 1].
    """
    zeros_R, ones_R = torch.zeros_like(overlap_R), torch.ones_like(overlap_R)
    share_R = torch.exp(-LK_ETA * overlap_R)
    safe_R = overlap_R.clamp(min=_LEAST_OVERLAP)
    parts: dict[LossName, tuple[Tensor, Tensor, Tensor]] = {
        "kl": (cross_entropy_R, ones_R, zeros_R),
        "tv": (1.0 - overlap_R, zeros_R, -ones_R),
        "lk_alpha": (-safe_R.log(), zeros_R, -1.0 / safe_R),
        "lk_hybrid": (
            share_R * cross_entropy_R + (1.0 - share_R) * (1.0 - overlap_R),
            share_R,
            share_R - 1.0,
        ),
    }
    weighted = [[weight * x for x in parts[name]] for name, weight in loss.items()]
    return RowLosses(*(torch.stack(column).sum(0) for column in zip(*weighted, strict=True)))


def gradient(probs: Tensor, target_probs: Tensor, losses: RowLosses) -> Tensor:
    """Of each row's loss in the draft's logits, [R, Vd].

    The overlap grows with the probabilities that lie below the target's, and with these alone.

    Args:
        probs: The draft's q, [R, Vd].
        target_probs: The target's p, [R, Vd].
        losses: ``mix`` of the rows' figures.
    """
    below = probs * (probs < target_probs)
    by_logits = below - probs * below.sum(-1, keepdim=True)
    of_cross_entropy = losses.by_cross_entropy_R[:, None] * (probs - target_probs)
    return of_cross_entropy + losses.by_overlap_R[:, None] * by_logits
