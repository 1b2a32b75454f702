"""Elementwise stretches as one kernel each on a GPU, and as plain PyTorch on the CPU."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compiled_on_gpu(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile ``function`` where its first argument is on a GPU.

    All of its tensors of two dimensions and more have rows first. Their number is dynamic and
    widths are static: one compilation serves packs of any length.
    """
    fused = torch.compile(function)

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not first.is_cuda:
            return function(*args, **kwargs)
        for arg in args:
            if isinstance(arg, Tensor) and arg.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(arg, 0)  # noqa: SLF001 - documented there
        return fused(*args, **kwargs)

    return run
