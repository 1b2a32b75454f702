"""The one rule of precision inside the models: what is summed or exponentiated is float32."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it comes so. A softmax in bf16 is 8 to 23 % off."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
