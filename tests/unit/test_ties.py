"""Answers that differ by rounding, and those that a draft is to blame for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from torchspec_lib.data.selection import HeldoutPrompt
from torchspec_lib.evaluation.ties import part_at_a_tie, steps_apart

PROMPT = HeldoutPrompt("p", np.array([1, 2], np.int32), "What?", "")


class Target(nn.Module):
    """Has given logits for the token behind the prompt and one token of the answer."""

    def __init__(self, logits: dict[int, float], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_parameter("any", nn.Parameter(torch.zeros(1, dtype=dtype)))
        self._logits = torch.full((1, 1, 20), -9.0, dtype=dtype)
        for token, logit in logits.items():
            self._logits[0, 0, token] = logit

    def forward(self, token_ids: torch.Tensor, logits_to_keep: int) -> SimpleNamespace:
        assert token_ids.tolist() == [[1, 2, 7]]
        assert logits_to_keep == 1
        return SimpleNamespace(logits=self._logits)


@pytest.mark.parametrize(
    ("dtype", "logits", "is_tie"),
    [
        (torch.bfloat16, {8: 12.125, 9: 12.125}, True),
        (torch.bfloat16, {8: 17.375, 9: 17.25}, True),
        (torch.bfloat16, {8: 12.0, 9: 12.25}, True),
        (torch.bfloat16, {8: 12.0, 9: 12.5}, False),
        (torch.float32, {8: 12.0, 9: 12.25}, False),
        (torch.float32, {8: 12.0, 9: 12.0}, True),
        (torch.bfloat16, {8: 0.0, 9: 0.0}, True),
        (torch.bfloat16, {8: 0.001, 9: -0.001}, False),
    ],
)
def test_a_tie_is_some_steps_of_the_dtype_wide(dtype, logits, is_tie):
    assert part_at_a_tie(Target(logits, dtype), PROMPT, [7, 8, 3], [7, 9, 4]) is is_tie


def test_an_answer_that_goes_on_where_the_other_ends_is_no_tie():
    model = Target({}, torch.bfloat16)
    assert not part_at_a_tie(model, PROMPT, [7], [7, 9])
    assert not part_at_a_tie(model, PROMPT, [7, 9], [7])


def test_steps_are_as_wide_as_at_the_larger_number():
    def apart(a: float, b: float) -> float:
        return steps_apart(torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16())

    assert apart(8.0, 8.0625) == 1
    assert apart(-16.0, -16.125) == 1
    assert apart(7.96875, 8.0) == 0.5
