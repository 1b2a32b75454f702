"""The draft vocabulary: which target tokens a draft can propose, and how ids map.

``V`` target vocabulary, ``Vd`` draft vocabulary. Draft ids ascend with target ids.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import ConfigError

WEIGHTS, TORCH_WEIGHTS, OFFSETS = "model.safetensors", "pytorch_model.bin", "d2t"
"""Where a draft keeps its vocabulary: target id = draft id + offset."""


def inherited_vocab(run: RunConfig) -> npt.NDArray[np.int64] | None:
    """The vocabulary of the draft that a run continues, where ``continual_vocab`` keeps it.

    Returns:
        [Vd] target ids, ascending; None where nothing is continued, where it is a checkpoint
        (whose own check of the vocabulary stands), or where its vocabulary isn't pruned.

    Raises:
        ConfigError: What is to be continued isn't there, or is of another size.
    """
    size, training = run.draft.vocab_size, run.training
    if size is None or training.continual_from is None or training.continual_vocab == "remap":
        return None
    offsets = _offsets(training.continual_path)
    if offsets is None:
        return None
    if len(offsets) != size:
        raise ConfigError(
            "draft.vocab_size",
            f"{size} tokens are to be kept, and the draft in training.continual_from has "
            f"{len(offsets)}",
            f"Set it to {len(offsets)}, or training.continual_vocab to remap",
        )
    return np.arange(len(offsets)) + offsets


def _offsets(draft: Path) -> npt.NDArray[np.int64] | None:
    if (draft / WEIGHTS).is_file():
        with safe_open(draft / WEIGHTS, framework="numpy") as tensors:
            if OFFSETS not in tensors.keys():  # noqa: SIM118 - not a mapping
                return None
            found: npt.NDArray[np.int64] = tensors.get_tensor(OFFSETS)
            return found
    if (draft / TORCH_WEIGHTS).is_file():
        import torch  # seconds, for the few that were published so

        weights = torch.load(
            draft / TORCH_WEIGHTS, map_location="cpu", mmap=True, weights_only=True
        )
        if OFFSETS in weights:
            offsets: npt.NDArray[np.int64] = weights[OFFSETS].numpy()
            return offsets
    return None


def choose_draft_vocab(
    counts: npt.NDArray[np.int64], size: int, always_in: Collection[int]
) -> npt.NDArray[np.int64]:
    """The most frequent target tokens; ties and unused tokens go to the lower id.

    Args:
        counts: [V], how often each target token is supervised.
        size: Vd.
        always_in: Target ids that are in however rare: a draft that can't end a turn is useless.

    Returns:
        [Vd] target ids, ascending.

    Raises:
        ConfigError: ``size`` exceeds V, or can't hold ``always_in``.

    Example:
        >>> choose_draft_vocab(np.array([0, 5, 0, 9, 5]), 3, always_in=[0])
        array([0, 1, 3])
    """
    fixed = np.unique(np.fromiter(always_in, dtype=np.int64))
    if not len(fixed) <= size <= len(counts):
        raise ConfigError(
            "draft.vocab_size",
            f"{size} is impossible: the target has {len(counts)} tokens, "
            f"and {len(fixed)} that end a turn must be in",
            f"Set it within {len(fixed)}..{len(counts)}, or leave it out for all tokens",
        )
    by_frequency = np.argsort(-counts, kind="stable")
    others = by_frequency[~np.isin(by_frequency, fixed)]
    return np.sort(np.concatenate([fixed, others[: size - len(fixed)]]))
