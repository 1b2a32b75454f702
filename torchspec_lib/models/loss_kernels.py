"""Triton kernels of the losses: two reads and one write of a block of logits, or three."""

# ruff: noqa: ANN001, ANN202 - pointers and sizes, as Triton hands them over
# mypy: ignore-errors
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec_lib.config.training import FORWARD_KL, LossName
from torchspec_lib.models.losses import mix

_COLUMNS, _WARPS = 8192, 8
"""Of a row that are held at a time, and by how many warps."""


@triton.jit
def _log_sums(draft_ptr, teacher_ptr, num_columns, BLOCK: tl.constexpr):
    """A row's log sums, the mean of the draft's logits under the target, the draft's choice."""
    draft_top, teacher_top = -float("inf"), -float("inf")
    draft_sum, teacher_sum, product, choice = 0.0, 0.0, 0.0, 0
    for first in tl.range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        ok = columns < num_columns
        q = tl.load(draft_ptr + columns, mask=ok, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher_ptr + columns, mask=ok, other=-float("inf")).to(tl.float32)
        top, index = tl.max(q, 0, return_indices=True)
        choice = tl.where(top > draft_top, first + index, choice)
        new_top = tl.maximum(draft_top, top)
        draft_sum = draft_sum * tl.exp(draft_top - new_top) + tl.sum(tl.exp(q - new_top), 0)
        draft_top = new_top
        new_top = tl.maximum(teacher_top, tl.max(t, 0))
        shrink, probs = tl.exp(teacher_top - new_top), tl.exp(t - new_top)
        teacher_sum = teacher_sum * shrink + tl.sum(probs, 0)
        product = product * shrink + tl.sum(probs * tl.where(ok, q, 0.0), 0)
        teacher_top = new_top
    draft_log_sum = draft_top + tl.log(draft_sum)
    teacher_log_sum = teacher_top + tl.log(teacher_sum)
    return draft_log_sum, teacher_log_sum, product / teacher_sum, choice


@triton.jit
def _probabilities(
    draft_ptr, teacher_ptr, draft_log_sum, teacher_log_sum, columns, num_columns
):  # fmt: skip
    """Some of a row's draft and target probabilities; 0 past the row's end."""
    ok = columns < num_columns
    q = tl.load(draft_ptr + columns, mask=ok, other=-float("inf")).to(tl.float32)
    t = tl.load(teacher_ptr + columns, mask=ok, other=-float("inf")).to(tl.float32)
    return tl.exp(q - draft_log_sum), tl.exp(t - teacher_log_sum)


@triton.jit
def _soft_cross_entropy_kernel(
    draft_ptr, teacher_ptr, weight_ptr, loss_ptr, choice_ptr, num_columns, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: ``loss = log(sum(exp(q))) - sum(p * q)`` for logits q and probabilities p."""
    row = tl.program_id(0).to(tl.int64)
    draft_ptr += row * num_columns
    teacher_ptr += row * num_columns
    draft_log_sum, teacher_log_sum, mean, choice = _log_sums(
        draft_ptr, teacher_ptr, num_columns, BLOCK
    )
    tl.store(loss_ptr + row, draft_log_sum - mean)
    tl.store(choice_ptr + row, choice.to(tl.int64))
    weight = tl.load(weight_ptr + row)
    for first in tl.range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        q, p = _probabilities(
            draft_ptr, teacher_ptr, draft_log_sum, teacher_log_sum, columns, num_columns
        )
        grad = (q - p) * weight
        tl.store(
            draft_ptr + columns, grad.to(draft_ptr.dtype.element_ty), mask=columns < num_columns
        )


@triton.jit
def _figures_kernel(
    draft_ptr, teacher_ptr, figures_ptr, choice_ptr, num_rows, num_columns, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: cross entropy, overlap, the draft's share below the target, both log sums."""
    row = tl.program_id(0).to(tl.int64)
    draft_ptr += row * num_columns
    teacher_ptr += row * num_columns
    draft_log_sum, teacher_log_sum, mean, choice = _log_sums(
        draft_ptr, teacher_ptr, num_columns, BLOCK
    )
    overlap, below = 0.0, 0.0
    for first in tl.range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        q, p = _probabilities(
            draft_ptr, teacher_ptr, draft_log_sum, teacher_log_sum, columns, num_columns
        )
        overlap += tl.sum(tl.minimum(q, p), 0)
        below += tl.sum(tl.where(q < p, q, 0.0), 0)
    figures_ptr += row
    tl.store(figures_ptr, draft_log_sum - mean)
    tl.store(figures_ptr + num_rows, overlap)
    tl.store(figures_ptr + 2 * num_rows, below)
    tl.store(figures_ptr + 3 * num_rows, draft_log_sum)
    tl.store(figures_ptr + 4 * num_rows, teacher_log_sum)
    tl.store(choice_ptr + row, choice.to(tl.int64))


@triton.jit
def _gradient_kernel(
    draft_ptr, teacher_ptr, figures_ptr, factors_ptr, num_rows, num_columns, BLOCK: tl.constexpr
):  # fmt: skip
    """One row of ``losses.gradient``, in the place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    draft_ptr += row * num_columns
    teacher_ptr += row * num_columns
    below = tl.load(figures_ptr + 2 * num_rows + row)
    draft_log_sum = tl.load(figures_ptr + 3 * num_rows + row)
    teacher_log_sum = tl.load(figures_ptr + 4 * num_rows + row)
    by_cross_entropy = tl.load(factors_ptr + row)
    by_overlap = tl.load(factors_ptr + num_rows + row)
    for first in tl.range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        q, p = _probabilities(
            draft_ptr, teacher_ptr, draft_log_sum, teacher_log_sum, columns, num_columns
        )
        grad = by_cross_entropy * (q - p) + by_overlap * (tl.where(q < p, q, 0.0) - q * below)
        tl.store(
            draft_ptr + columns, grad.to(draft_ptr.dtype.element_ty), mask=columns < num_columns
        )


def fused_loss_of_rows_(
    logits: Tensor,
    teacher: Tensor,
    weights_R: Tensor,
    loss: Mapping[LossName, float] = FORWARD_KL,
) -> tuple[Tensor, Tensor]:
    """``head_loss.loss_of_rows_`` on a GPU, in float32.

    Args:
        logits: [R, Vd], contiguous; overwritten.
        teacher: [R, Vd], contiguous.
        weights_R: float32, contiguous.
        loss: Weight of each of ``models.losses``.
    """
    num_rows, num_columns = logits.shape
    choices_R = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    block, grid = min(_COLUMNS, triton.next_power_of_2(num_columns)), (num_rows,)
    if loss == FORWARD_KL:
        losses_R = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        _soft_cross_entropy_kernel[grid](
            *(logits, teacher, weights_R, losses_R, choices_R, num_columns),
            BLOCK=block, num_warps=_WARPS,
        )  # fmt: skip
        return losses_R, choices_R
    figures_5R = torch.empty(5, num_rows, dtype=torch.float32, device=logits.device)
    _figures_kernel[grid](
        *(logits, teacher, figures_5R, choices_R, num_rows, num_columns),
        BLOCK=block, num_warps=_WARPS,
    )  # fmt: skip
    losses = mix(loss, figures_5R[0], figures_5R[1])
    factors_2R = torch.stack([losses.by_cross_entropy_R, losses.by_overlap_R]) * weights_R
    _gradient_kernel[grid](
        *(logits, teacher, figures_5R, factors_2R, num_rows, num_columns),
        BLOCK=block, num_warps=_WARPS,
    )  # fmt: skip
    return losses.values_R, choices_R
