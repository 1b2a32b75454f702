"""Draws tokens from a target's logits with random numbers that are given.

Shapes: ``B`` answers, ``V`` vocabulary.
"""

import torch
from torch import Tensor

from torchspec_lib.config.regeneration import RegenerationConfig


def draw(logits_BV: Tensor, numbers_B: Tensor, settings: RegenerationConfig) -> Tensor:
    """A token [B] for each answer, by inversion: its number says where in the distribution.

    Both limits hold at once, as in SGLang: a token is among the ``top_k`` likeliest, and those
    before it have less than ``top_p`` together.

    Args:
        logits_BV: Of the tokens that may follow.
        numbers_B: In [0, 1), on the same device.
        settings: ``temperature``, ``top_p`` and ``top_k``.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]] * 3)
        >>> draw(logits, torch.tensor([0.0, 0.7, 0.95]), RegenerationConfig(temperature=1.0))
        tensor([0, 2, 1])
    """
    if settings.temperature == 0.0:
        return logits_BV.argmax(-1)
    shares_BV = (logits_BV.float() / settings.temperature).softmax(-1)
    shares_BV, ids_BV = shares_BV.sort(dim=-1, descending=True, stable=True)
    is_out_BV = shares_BV.cumsum(-1) - shares_BV >= settings.top_p
    is_out_BV[:, 0] = False
    if settings.top_k:
        is_out_BV[:, settings.top_k :] = True
    cumulated_BV = shares_BV.masked_fill(is_out_BV, 0.0).cumsum(-1)
    drawn_B1 = torch.searchsorted(
        cumulated_BV, numbers_B[:, None] * cumulated_BV[:, -1:], right=True
    )
    last_B1 = (~is_out_BV).sum(-1, keepdim=True) - 1  # a number so near 1 that it is rounded to it
    return ids_BV.gather(1, drawn_B1.minimum(last_B1))[:, 0]
