"""Continual training: a draft that starts from another's weights, and from nothing else of it.

Shapes: ``Vd`` draft vocabulary, ``V`` the target's, ``H`` hidden size.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
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

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import CheckpointError, ConfigError, DraftFormatError
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.published import PublishedDraft, read_published
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.target import TargetSpec
from torchspec_lib.training import checkpoint_files as files
from torchspec_lib.training import tensor_files
from torchspec_lib.training.fsdp import together
from torchspec_lib.training.state import identity_differences, vocabulary_id

logger = logging.getLogger(__name__)

DRAFT_PREFIX = "draft."
"""Of the draft's parameters within the model that is trained."""
LM_HEAD = "lm_head.weight"

_MAY_DIFFER = {
    *("dtype", "max_position_embeddings", "bos_token_id", "eos_token_ids"),
    "draft_vocab_size",  # what the vocabulary is says more
}
_TRAINED_ON = {"rope_parameters", "rms_norm_eps"}
"""The run's are the target's; weights that were trained with others get used to them."""
_FROM_FIRST_RANK = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
_SOME_FROM_FIRST_RANK = StateDictOptions(
    full_state_dict=True, broadcast_from_rank0=True, strict=False
)


@dataclass(frozen=True, slots=True, eq=False)
class FreshDraft:
    """A draft before its first step, which is to start from other weights."""

    model: nn.Module
    """The draft within its training-time test, sharded."""
    config: DraftModelConfig
    draft_vocab: npt.NDArray[np.int64] | None
    """Ascending target ids, [Vd]; None for the target's whole vocabulary."""
    head: TargetHead
    """The target's, whose rows new tokens start as, and a frozen head stays."""
    target: TargetSpec
    run: RunConfig


def load_weights(path: Path, fresh: FreshDraft) -> None:
    """Give a draft the weights at ``path``. All ranks take part.

    Args:
        path: A checkpoint of any run, an exported draft or a published one.
        fresh: What is to start from it.

    Raises:
        ConfigError: It is damaged or doesn't fit; the message says what differs.
    """
    load = _load_checkpoint if (path / files.META).is_file() else _load_draft
    try:
        load(path, fresh)
    except CheckpointError as error:
        raise _refusal(path, error.problem) from error
    except DraftFormatError as error:
        raise _refusal(path, "; ".join(error.problems)) from error
    if fresh.run.draft.freeze_head:
        rows = fresh.head.draft_rows_VdH.to(torch.float32)
        frozen: dict[str, Any] = {}
        if dist.get_rank() == 0:
            frozen[f"{DRAFT_PREFIX}{LM_HEAD}"] = rows
        set_model_state_dict(fresh.model, frozen, options=_SOME_FROM_FIRST_RANK)


def check_start(run: RunConfig, target: TargetSpec) -> None:
    """Refuse a draft's folder that can't be started from, before there are engines and trainers.

    A checkpoint is checked once it is loaded, and so is the vocabulary, which the data decide.

    Raises:
        ConfigError: It is damaged or doesn't fit; the message says what differs.
    """
    path = run.training.continual_path
    if (path / files.META).is_file():
        return
    num_tokens = run.draft.vocab_size or target.vocab_size
    own = DraftModelConfig.from_target(target, run.draft, num_tokens, "float32")
    try:
        found = read_published(path, target)
    except DraftFormatError as error:
        raise _refusal(path, "; ".join(error.problems)) from error
    if problems := _network_problems(found.config, own):
        raise _refusal(path, "; ".join(problems))


def _refusal(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        "training.continual_from",
        f"{path} can't be started from: {problem}",
        "Name a whole checkpoint or draft of the same shape and draft vocabulary, set the draft's "
        "settings to its own, or leave it out. The vocabulary of a draft's folder, not of a "
        "checkpoint, may be another with training.continual_vocab: remap",
    )


def _load_checkpoint(path: Path, fresh: FreshDraft) -> None:
    meta = together(partial(files.read_meta, path))[dist.get_rank()]
    tensor_files.verify(path, meta["files"])
    wanted: dict[str, Any] = {"model": get_model_state_dict(fresh.model)}
    own = {
        "draft.aux_layer_ids": list(fresh.config.aux_layer_ids),
        "draft.fc_norm": fresh.config.fc_norm,
        "draft.norm_output": fresh.config.norm_output,
        "draft.vocabulary": vocabulary_id(fresh.draft_vocab),
    }
    together(partial(_check_checkpoint, path, meta["identity"], own, wanted["model"]))
    tensor_files.read(path, wanted)
    set_model_state_dict(fresh.model, wanted["model"])


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


def _load_draft(path: Path, fresh: FreshDraft) -> None:
    """The first rank reads it, the others get their shares of it."""
    weights: dict[str, Any] = {}

    def read() -> None:
        if dist.get_rank() == 0:
            weights.update(_draft_weights(path, fresh))

    together(read)
    set_model_state_dict(fresh.model, weights, options=_FROM_FIRST_RANK)


def _draft_weights(path: Path, fresh: FreshDraft) -> dict[str, Tensor]:
    """Of the model that is trained, in float32."""
    found = read_published(path, fresh.target)
    _check_draft(path, found, fresh)
    _warn_of_changes(path, found, fresh)
    weights: Mapping[str, Tensor] = found.weights
    if vocabulary_id(found.draft_vocab) != vocabulary_id(fresh.draft_vocab):
        weights = {**weights, LM_HEAD: _remapped_head(found, fresh)}
    return {f"{DRAFT_PREFIX}{name}": tensor.to(torch.float32) for name, tensor in weights.items()}


def _check_draft(path: Path, found: PublishedDraft, fresh: FreshDraft) -> None:
    problems = _network_problems(found.config, fresh.config)
    if fresh.run.training.continual_vocab == "keep":
        there, here = (vocabulary_id(draft.draft_vocab) for draft in (found, fresh))
        problems += identity_differences({"vocabulary": there}, {"vocabulary": here})
    if problems:
        raise _refusal(path, "; ".join(problems))


def _network_problems(there: DraftModelConfig, here: DraftModelConfig) -> list[str]:
    left_out = _MAY_DIFFER | _TRAINED_ON
    return identity_differences(
        there.model_dump(exclude=left_out), here.model_dump(exclude=left_out)
    )


def _warn_of_changes(path: Path, found: PublishedDraft, fresh: FreshDraft) -> None:
    there, here = (c.model_dump(include=_TRAINED_ON) for c in (found.config, fresh.config))
    for difference in identity_differences(there, here):
        logger.warning("event=starts_with_other_settings path=%s %s", path, difference)
    own = fresh.head.embed_VH
    if found.embedding is not None and not _is_alike(found.embedding, own):
        logger.warning(
            "event=embedding_left_out path=%s it isn't the target's, which engines put in its "
            "place: the draft goes on with the target's",
            path,
        )


def _is_alike(embedding: Tensor, own_VH: Tensor) -> bool:
    """Up to the rounding of the coarser dtype."""
    theirs, own = embedding.float(), own_VH.detach().cpu().float()
    return theirs.shape == own.shape and torch.allclose(theirs, own, rtol=1e-2, atol=1e-3)


def _remapped_head(found: PublishedDraft, fresh: FreshDraft) -> Tensor:
    """The head over the run's vocabulary, [Vd, H]: shared tokens' rows, and else the target's."""
    theirs = _target_ids(found.draft_vocab, found.config.vocab_size)
    row_of_id_V = torch.full((fresh.config.vocab_size,), -1)
    row_of_id_V[theirs] = torch.arange(len(theirs))
    row_Vd = row_of_id_V[_target_ids(fresh.draft_vocab, fresh.config.vocab_size)]
    is_shared_Vd = row_Vd >= 0
    head_VdH = fresh.head.draft_rows_VdH.detach().to("cpu", torch.float32, copy=True)
    head_VdH[is_shared_Vd] = found.weights[LM_HEAD][row_Vd[is_shared_Vd]].to(torch.float32)
    num_shared = int(is_shared_Vd.sum())
    logger.info(
        "event=vocabulary_remapped shared=%d new=%d", num_shared, len(is_shared_Vd) - num_shared
    )
    return head_VdH


def _target_ids(draft_vocab: npt.NDArray[np.int64] | None, vocab_size: int) -> Tensor:
    return torch.arange(vocab_size) if draft_vocab is None else torch.from_numpy(draft_vocab)
