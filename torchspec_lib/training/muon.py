"""Muon for matrices that ranks share: each is orthogonalised whole, by one rank."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

MOMENTUM = 0.95
NUM_ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


class Muon(Optimizer):
    """Steps along the orthogonalised momentum (Jordan et al. 2024), to the bit as torch's own does.

    Torch's multiplies shards, some twenty collectives a matrix and step. Here a matrix is gathered
    once, orthogonalised by a rank that has few others to do, and sent to all: two collectives.

    The step has AdamW's usual size (Liu et al. 2025, arXiv 2502.16982, equation 4), so that one
    learning rate and one weight decay hold for both.
    """

    def __init__(self, matrices: list[Parameter], lr: float, weight_decay: float) -> None:
        """Update ``matrices``, which every rank must name in the same order."""
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """A collective of the default process group, if there is one."""
        rank, num_ranks = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            own: dict[int, Tensor] = {}
            for index, matrix in enumerate(matrices):
                whole = _whole(self._direction(matrix).bfloat16())
                if index % num_ranks == rank:
                    own[index] = orthogonalised(whole)
            for index, matrix in enumerate(matrices):
                direction = own.pop(index, None)
                if direction is None:
                    direction = torch.empty(
                        matrix.shape, dtype=torch.bfloat16, device=matrix.device
                    )
                if num_ranks > 1:
                    dist.broadcast(direction, src=index % num_ranks)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * math.sqrt(max(matrix.shape))
                matrix.add_(_as_shared(direction, matrix), alpha=-group["lr"] * scale)

    def _direction(self, matrix: Parameter) -> Tensor:
        """Nesterov's momentum, in shards as ``matrix`` is."""
        state: dict[str, Any] = self.state[matrix]
        assert matrix.grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        momentum: Tensor = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are near 1, roughly within 0.7 and 1.2.

    Newton-Schulz iterations of the fifth order, in bfloat16.

    Args:
        matrix: [m, n], of any scale.

    Returns:
        [m, n], contiguous.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=EPS)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).contiguous()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_shared(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's share of what all ranks have, as it has one of ``parameter``."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
