"""Answers that part where the target has no preference: rounding chooses there, not the draft.

One row at a time and several at once are added up in another order. In bfloat16 that turns the
choice between two tokens whose logits are equal or neighbours.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchspec_lib.data.selection import HeldoutPrompt
from torchspec_lib.evaluation.speculative import length_of_agreement

MOST_STEPS = 4
"""Steps of the dtype between two logits that still are a tie. Seen on an H200 in bfloat16: 0 or 1
in 18 of 18 answers; another engine's kernels round differently by some steps."""

logger = logging.getLogger(__name__)


@torch.inference_mode()
def part_at_a_tie(
    model: nn.Module, prompt: HeldoutPrompt, plain: Sequence[int], speculative: Sequence[int]
) -> bool:
    """Whether two greedy answers first differ in tokens that are as good as equal to the target.

    Args:
        model: The target, as a model of transformers.
        prompt: What was asked.
        plain: Token ids of plain decoding's answer.
        speculative: Token ids of the other one.
    """
    same = length_of_agreement(plain, speculative)
    if same == min(len(plain), len(speculative)):  # one goes on where the other ends
        return False
    ids = [*prompt.prompt_token_ids.tolist(), *plain[:same]]
    token_ids = torch.tensor([ids], device=next(model.parameters()).device)
    logits_V: Tensor = model(token_ids, logits_to_keep=1).logits[0, -1]
    first, second = logits_V[plain[same]], logits_V[speculative[same]]
    is_tie = steps_apart(first, second) <= MOST_STEPS
    logger.warning(
        "event=not_lossless prompt=%s new_token=%d plain=%d speculative=%d logits=%.4f,%.4f tie=%s",
        prompt.prompt_id,
        same,
        plain[same],
        speculative[same],
        first,
        second,
        is_tie,
    )
    return is_tie


def steps_apart(first: Tensor, second: Tensor) -> float:
    """Distance of two numbers in steps of their dtype, as wide as at the larger of them."""
    largest = max(abs(first.item()), abs(second.item()))
    exponent = math.frexp(largest)[1] - 1
    step = torch.finfo(first.dtype).eps * 2.0**exponent
    return abs(first.item() - second.item()) / step
