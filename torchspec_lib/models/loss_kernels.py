"""Triton kernel of the soft cross entropy: two reads and one write of a block of logits."""

# ruff: noqa: ANN001, ANN202 - pointers and sizes, as Triton hands them over
# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _WARPS = 8192, 8
"""Of a row that are held at a time, and by how many warps."""


@triton.jit
def _soft_cross_entropy_kernel(
    draft_ptr, teacher_ptr, weight_ptr, loss_ptr, choice_ptr, num_columns, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: ``loss = log(sum(exp(q))) - sum(p * q)`` for logits q and probabilities p."""
    row = tl.program_id(0).to(tl.int64)
    draft_ptr += row * num_columns
    teacher_ptr += row * num_columns
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
    tl.store(loss_ptr + row, draft_log_sum - product / teacher_sum)
    tl.store(choice_ptr + row, choice.to(tl.int64))
    weight = tl.load(weight_ptr + row)
    for first in tl.range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        ok = columns < num_columns
        q = tl.load(draft_ptr + columns, mask=ok, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + columns, mask=ok, other=0.0).to(tl.float32)
        grad = (tl.exp(q - draft_log_sum) - tl.exp(t - teacher_log_sum)) * weight
        tl.store(draft_ptr + columns, grad.to(draft_ptr.dtype.element_ty), mask=ok)


def fused_loss_of_rows_(
    logits: Tensor, teacher: Tensor, weights_R: Tensor
) -> tuple[Tensor, Tensor]:
    """``head_loss.loss_of_rows_`` on a GPU, in float32.

    Args:
        logits: [R, Vd], contiguous; overwritten.
        teacher: [R, Vd], contiguous.
        weights_R: float32, contiguous.
    """
    num_rows, num_columns = logits.shape
    losses_R = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    choices_R = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    block = min(_COLUMNS, triton.next_power_of_2(num_columns))
    _soft_cross_entropy_kernel[(num_rows,)](
        logits, teacher, weights_R, losses_R, choices_R, num_columns, BLOCK=block, num_warps=_WARPS
    )
    return losses_R, choices_R
