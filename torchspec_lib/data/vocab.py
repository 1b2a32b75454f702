"""The draft vocabulary: which target tokens a draft can propose, and how ids map.

``V`` target vocabulary, ``Vd`` draft vocabulary. Draft ids ascend with target ids.
"""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import ConfigError

WEIGHTS, OFFSETS = "model.safetensors", "d2t"
"""Where an exported draft keeps its vocabulary: target id = draft id + offset."""


def inherited_vocab(run: RunConfig) -> npt.NDArray[np.int64] | None:
    """The vocabulary of the exported draft that a run continues, which its weights fit alone.

    Returns:
        [Vd] target ids, ascending; None where nothing is continued, where it is a checkpoint
        (whose own check of the vocabulary stands), or where its vocabulary isn't pruned.

    Raises:
        ConfigError: What is to be continued isn't there.
    """
    if run.draft.vocab_size is None or run.training.continual_from is None:
        return None
    weights = run.training.continual_path / WEIGHTS
    if not weights.is_file():
        return None
    with safe_open(weights, framework="numpy") as tensors:
        if OFFSETS not in tensors.keys():  # noqa: SIM118 - not a mapping
            return None
        offsets: npt.NDArray[np.int64] = tensors.get_tensor(OFFSETS)
    return np.arange(len(offsets)) + offsets


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
