"""Continual training: a draft that starts from another's weights, and from nothing else of it."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from torchspec_lib.errors import CheckpointError, ConfigError, DraftFormatError
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.export import load_draft
from torchspec_lib.training import checkpoint_files as files
from torchspec_lib.training import tensor_files
from torchspec_lib.training.fsdp import together
from torchspec_lib.training.state import identity_differences, vocabulary_id

DRAFT_PREFIX = "draft."
"""Of the draft's parameters within the model that is trained."""

_MAY_DIFFER = {"dtype", "max_position_embeddings", "bos_token_id", "eos_token_ids"}
_FROM_FIRST_RANK = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def load_weights(
    path: Path,
    model: nn.Module,
    config: DraftModelConfig,
    draft_vocab: npt.NDArray[np.int64] | None,
) -> None:
    """Give ``model`` the weights at ``path``. All ranks take part.

    Args:
        path: A checkpoint of any run, or an exported draft.
        model: The draft within its training-time test, sharded.
        config: The draft's.
        draft_vocab: Ascending target ids, [Vd]; None for the target's whole vocabulary.

    Raises:
        ConfigError: It is damaged or doesn't fit; the message says what differs.
    """
    load = _load_checkpoint if (path / files.META).is_file() else _load_draft
    try:
        load(path, model, config, draft_vocab)
    except CheckpointError as error:
        raise _refusal(path, error.problem) from error
    except DraftFormatError as error:
        raise _refusal(path, "; ".join(error.problems)) from error


def _refusal(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        "training.continual_from",
        f"{path} can't be started from: {problem}",
        "Name a whole checkpoint or draft of the same shape and draft vocabulary, or leave it out",
    )


def _load_checkpoint(
    path: Path,
    model: nn.Module,
    config: DraftModelConfig,
    draft_vocab: npt.NDArray[np.int64] | None,
) -> None:
    meta = together(partial(files.read_meta, path))[dist.get_rank()]
    tensor_files.verify(path, meta["files"])
    wanted: dict[str, Any] = {"model": get_model_state_dict(model)}
    own = {
        "draft.aux_layer_ids": list(config.aux_layer_ids),
        "draft.vocabulary": vocabulary_id(draft_vocab),
    }
    together(partial(_check_checkpoint, path, meta["identity"], own, wanted["model"]))
    tensor_files.read(path, wanted)
    set_model_state_dict(model, wanted["model"])


def _check_checkpoint(
    path: Path, identity: dict[str, Any], own: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    problems = identity_differences({key: identity.get(key) for key in own}, own)
    stored = tensor_files.shapes(path)
    for name, weight in weights.items():
        there, here = stored.get(f"model.{name}"), tuple(weight.shape)
        if there != here:
            found = "missing" if there is None else f"{list(there)}"
            problems.append(f"tensor {name} is {found} there and {list(here)} here")
    if problems:
        raise _refusal(path, "; ".join(problems))


def _load_draft(
    path: Path,
    model: nn.Module,
    config: DraftModelConfig,
    draft_vocab: npt.NDArray[np.int64] | None,
) -> None:
    """The first rank reads it, the others get their shares of it."""
    weights: dict[str, Any] = {}

    def read() -> None:
        if dist.get_rank() == 0:
            weights.update(_draft_weights(path, config, draft_vocab))

    together(read)
    set_model_state_dict(model, weights, options=_FROM_FIRST_RANK)


def _draft_weights(
    path: Path, config: DraftModelConfig, draft_vocab: npt.NDArray[np.int64] | None
) -> dict[str, Tensor]:
    loaded = load_draft(path)
    there, here = (c.model_dump(exclude=_MAY_DIFFER) for c in (loaded.config, config))
    there["vocabulary"], here["vocabulary"] = map(vocabulary_id, (loaded.draft_vocab, draft_vocab))
    if problems := identity_differences(there, here):
        raise _refusal(path, "; ".join(problems))
    tensors = loaded.draft.state_dict()
    return {f"{DRAFT_PREFIX}{name}": tensor.to(torch.float32) for name, tensor in tensors.items()}
