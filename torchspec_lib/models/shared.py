"""Tensors that every depth of a forward reads, whose gradients are summed in float32.

Autograd would sum the depths' gradients in the tensor's own dtype, with one more pass over
memory for each. Here every use adds to one float32 sum (a matrix product does so by itself),
which autograd gets once, when the last use is through.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Shared:
    """A tensor with many uses in one forward, and the sum of their gradients.

    A use is an autograd function that is given ``token``, reads ``value``, and in its backward
    adds to ``grad``.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.value = tensor.detach()
        self._sum = _Sum(self.value)
        self.token: Tensor = _Source.apply(tensor, self._sum)  # type: ignore[no-untyped-call]
        """Orders the uses' backward before that of ``tensor``; its value means nothing."""

    @property
    def grad(self) -> Tensor:
        """The sum so far, at least float32; zeros at first."""
        return self._sum.so_far


class _Sum:
    """Apart from its ``Shared``, which knows of the graph: so that no cycle keeps them alive."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._total: Tensor | None = None

    @property
    def so_far(self) -> Tensor:
        if self._total is None:
            dtype = torch.promote_types(self._like.dtype, torch.float32)
            self._total = torch.zeros(self._like.shape, dtype=dtype, device=self._like.device)
        return self._total

    def take(self) -> Tensor:
        """The sum, which starts anew."""
        total, self._total = self.so_far, None
        return total


class _Source(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, uses: _Sum) -> Tensor:
        ctx.uses = uses
        return tensor.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _token_grad: Tensor) -> tuple[Tensor, None]:
        return ctx.uses.take(), None


def shared_linear(x: Tensor, weight: Shared, rows: slice = slice(None)) -> Tensor:
    """``x @ weight[rows].T`` for x [R, in] and a weight [out, in]."""
    out: Tensor = _Linear.apply(x, weight.token, weight, rows)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _token: Tensor, weight: Shared, rows: slice) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.rows = weight, rows
        return F.linear(x, weight.value[rows])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        add_product_(ctx.weight.grad[ctx.rows], grad.T, x)
        return grad @ ctx.weight.value[ctx.rows], None, None, None


def shared_rows(table: Shared, first: int, num_rows: int) -> Tensor:
    """``table[first : first + num_rows]``."""
    out: Tensor = _Rows.apply(table.token, table, first, num_rows)  # type: ignore[no-untyped-call]
    return out


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _token: Tensor, table: Shared, first: int, num_rows: int) -> Tensor:
        ctx.table, ctx.first = table, first
        return table.value[first : first + num_rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ctx.table.grad[ctx.first : ctx.first + len(grad)] += grad
        return None, None, None, None


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, summed in ``total``'s dtype, in place."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # no such product on the CPU
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
