"""The draft's head and its loss as one: logits live for a block of rows, gradients come at once.

Shapes: ``C`` chains, ``K`` depths, ``H`` hidden size, ``Vd`` draft vocabulary, ``R`` rows of a
block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from torchspec_lib.config.training import FORWARD_KL, LossName
from torchspec_lib.models.losses import gradient, mix
from torchspec_lib.models.precision import at_least_fp32
from torchspec_lib.models.shared import add_product_

BLOCK_LOGITS = 1 << 29
"""Draft logits held at a time: 1 GiB in bf16. Each block adds to the head's whole gradient."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadLoss:
    """What the head says of every chain at every depth."""

    total: Tensor
    """Scalar, float64: the weighted sum; the only one with a gradient."""
    losses_KC: Tensor
    """Unweighted; at least float32."""
    draft_ids_KC: Tensor
    """int64: the draft's greedy choices."""


def head_loss(
    states: Sequence[Tensor],
    lm_head_VdH: Tensor,
    teacher_Vd: Tensor,
    weights_KC: Tensor,
    loss: Mapping[LossName, float] = FORWARD_KL,
) -> HeadLoss:
    """The loss of every depth, without the logits of any.

    A forward with gradients computes them for each block while its logits are at hand, the
    head's summed in float32: so no product is computed twice, and the backward only scales them.

    Args:
        states: [C, H] for each depth, after the norm.
        lm_head_VdH: The draft's; may be frozen.
        teacher_Vd: The target's logits, [C + K - 1, Vd]: row c + k teaches chain c at depth k.
        weights_KC: Of each chain's loss in the total; 0 where it isn't trained.
        loss: Weight of each of ``models.losses``.
    """
    total, losses_KC, draft_ids_KC = _HeadLoss.apply(
        lm_head_VdH, teacher_Vd, weights_KC, loss, *states
    )  # type: ignore[no-untyped-call]
    return HeadLoss(total, losses_KC, draft_ids_KC)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lm_head: Tensor,
        teacher: Tensor,
        weights_KC: Tensor,
        loss: Mapping[LossName, float],
        *states: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(lm_head.dtype, torch.float32)
        losses_KC = torch.empty(weights_KC.shape, dtype=exact, device=weights_KC.device)
        draft_ids_KC = torch.empty(weights_KC.shape, dtype=torch.int64, device=weights_KC.device)
        scales_KC = weights_KC.to(exact)
        loss_of_rows = _loss_of_rows_for(lm_head.device)
        train, train_head = any(ctx.needs_input_grad), ctx.needs_input_grad[0]
        head_grad = torch.zeros_like(lm_head, dtype=exact) if train_head else None
        state_grads = [torch.empty_like(x) for x in states] if train else []
        for depth, x in enumerate(states):
            for rows in _blocks(len(x), len(lm_head)):
                logits = F.linear(x[rows], lm_head)
                shifted = teacher[rows.start + depth : rows.stop + depth]
                losses_KC[depth, rows], draft_ids_KC[depth, rows] = loss_of_rows(
                    logits, shifted, scales_KC[depth, rows], loss
                )
                if train:
                    torch.mm(logits, lm_head, out=state_grads[depth][rows])
                if head_grad is not None:
                    add_product_(head_grad, logits.T, x[rows])
        del logits, shifted  # the next line needs room
        # Rounded now, as autograd would: half the memory until the backward.
        ctx.head_grad = None if head_grad is None else head_grad.to(lm_head.dtype)
        ctx.state_grads = state_grads
        ctx.mark_non_differentiable(losses_KC, draft_ids_KC)
        return (weights_KC * losses_KC).sum(), losses_KC, draft_ids_KC

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, scale: Tensor, _losses: Tensor, _ids: Tensor
    ) -> tuple[Tensor | None, ...]:
        head_grad, state_grads = ctx.head_grad, ctx.state_grads
        del ctx.head_grad, ctx.state_grads
        if head_grad is not None:
            head_grad.mul_(scale)
        return head_grad, None, None, None, *(grad.mul_(scale) for grad in state_grads)


def loss_of_rows_(
    logits: Tensor,
    teacher: Tensor,
    weights_R: Tensor,
    loss: Mapping[LossName, float] = FORWARD_KL,
) -> tuple[Tensor, Tensor]:
    """The loss of each row and the draft's choice; in ``logits`` it leaves their gradients.

    Both softmaxes and the sum are at least in float32, whatever the logits are in.

    Args:
        logits: The draft's, [R, Vd]; overwritten.
        teacher: The target's, [R, Vd].
        weights_R: Factors of the gradients.
        loss: Weight of each of ``models.losses``.

    Returns:
        The unweighted losses [R], and the columns of the highest logits, int64 [R].
    """
    log_probs = at_least_fp32(logits).log_softmax(-1)
    probs, target_probs = log_probs.exp(), at_least_fp32(teacher).softmax(-1)
    cross_entropy_R = -(target_probs * log_probs).sum(-1)
    losses = mix(loss, cross_entropy_R, torch.minimum(probs, target_probs).sum(-1))
    draft_ids_R = logits.argmax(-1)
    logits.copy_(gradient(probs, target_probs, losses) * weights_R[:, None])
    return losses.values_R, draft_ids_R


def _loss_of_rows_for(device: torch.device) -> Callable[..., Any]:
    if device.type != "cuda":
        return loss_of_rows_
    # Triton comes with torch's CUDA builds alone.
    from torchspec_lib.models.loss_kernels import fused_loss_of_rows_

    return fused_loss_of_rows_


def _blocks(num_rows: int, vocab: int) -> Iterator[slice]:
    """Even blocks of rows, each of at most ``BLOCK_LOGITS`` logits (but of one row at least)."""
    most = max(1, BLOCK_LOGITS // vocab)
    num_blocks = -(-num_rows // most)
    size = -(-num_rows // num_blocks)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
