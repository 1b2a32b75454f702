"""Training prompts that nothing is trained on: what the snapshots of a training are decoded with.

They come from the training data, since a draft must not be chosen by the prompts that it is
finally judged by: the held-out ones.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from torchspec_lib.data.dataset import Prompts
from torchspec_lib.types import Prompt

_STREAM = 0x5E7A51DE
"""Keeps the choice independent of what else follows from the seed."""


def set_aside(num_prompts: int, num_aside: int, seed: int) -> npt.NDArray[np.int64]:
    """Which of a data set's prompts are set aside: ascending indices, the same for every caller."""
    chosen = np.random.default_rng([seed, _STREAM]).choice(num_prompts, num_aside, replace=False)
    return np.sort(chosen).astype(np.int64)


class TrainedPrompts:
    """The prompts of a data set but for those that are set aside, in their order."""

    def __init__(self, prompts: Prompts, aside: npt.NDArray[np.int64]) -> None:
        self._prompts = prompts
        self._indices = np.setdiff1d(np.arange(len(prompts)), aside)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[int(self._indices[index])]


def question(prompt: Prompt) -> Sequence[int]:
    """The token ids before a conversation's last answer.

    Example:
        ``[1, 52, 7]`` for ``Prompt(…, token_ids=[1, 52, 7, 2, 9], loss_mask=[0, 0, 0, 1, 1])``
    """
    is_answer = prompt.loss_mask.astype(np.int8)
    begins = np.flatnonzero(np.diff(is_answer, prepend=0) == 1)
    ids: list[int] = prompt.token_ids[: begins[-1]].tolist()
    return ids
