"""Drafts as others publish them, in our words: to start from, not to serve.

SafeAILab's, SGLang's and vLLM's folders differ in the tensors' names, in how they say which
layers are read, and in what they leave to a default. A draft that computes anything else than
ours is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import Tensor

from torchspec_lib.config.models import DraftConfig
from torchspec_lib.errors import ConfigError, DraftFormatError
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.draft_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    expected_tensors,
    field_problems,
    read_config,
    read_tensors,
)
from torchspec_lib.models.validate import name_problems, value_problems, vocab_problems
from torchspec_lib.target import TargetSpec, aux_layer_ids, rope_parameters

TORCH_FILE = "pytorch_model.bin"
EMBEDDING = "embed_tokens.weight"

_RENAMED = {
    "layers.0.": "midlayer.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
_REQUIRED: dict[str, Any] = {
    "num_hidden_layers": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "norm_before_residual": False,
    "norm_before_fc": False,
}
"""What a draft must say, or leave to just this default: nothing else is the network of ours."""


@dataclass(frozen=True, slots=True, eq=False)
class PublishedDraft:
    """A draft that can be started from."""

    config: DraftModelConfig
    weights: dict[str, Tensor]
    """By the names of ``Eagle3Draft``."""
    draft_vocab: npt.NDArray[np.int64] | None
    """Ascending target ids, [Vd]; None for the target's whole vocabulary."""
    embedding: Tensor | None
    """[V, H], where one came along: engines put the target's in its place."""


def read_published(folder: Path, target: TargetSpec) -> PublishedDraft:
    """Read anybody's EAGLE-3 draft, ours included.

    Args:
        folder: ``config.json``, and ``model.safetensors`` or ``pytorch_model.bin``.
        target: Whose default layers a draft reads that doesn't say which.

    Raises:
        DraftFormatError: A file is missing or broken, or the draft isn't the network of ours.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise DraftFormatError(str(folder), [f"{CONFIG_FILE} is missing"])
    raw = read_config(folder)
    tensors = {_own_name(name): tensor for name, tensor in _weights(folder).items()}
    embedding, d2t = tensors.pop(EMBEDDING, None), tensors.pop("d2t", None)
    t2d = tensors.pop("t2d", None)
    config = _own_config(folder, raw, tensors, target)
    problems = _weight_problems(tensors, config)
    draft_vocab = None
    if config.is_pruned and d2t is None:
        problems.append("tensor d2t is missing")
    elif config.is_pruned and d2t is not None:
        draft_vocab = (torch.arange(len(d2t)) + d2t.long()).numpy()
        problems += _pruning_problems(d2t.long(), t2d, config)
    if problems:
        raise DraftFormatError(str(folder), problems)
    return PublishedDraft(config, tensors, draft_vocab, embedding)


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS_FILE).is_file():
        return read_tensors(folder)
    if not (folder / TORCH_FILE).is_file():
        raise DraftFormatError(str(folder), [f"{WEIGHTS_FILE} or {TORCH_FILE} is missing"])
    try:
        found = torch.load(folder / TORCH_FILE, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise DraftFormatError(str(folder), [f"{TORCH_FILE}: {error}"]) from error
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _own_name(name: str) -> str:
    name = name.removeprefix("model.")
    for theirs, own in _RENAMED.items():
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    return name


def _own_config(
    folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetSpec
) -> DraftModelConfig:
    """The config as ours; what it leaves out is what the engines take for granted."""
    said = {**raw, **_eagle_config(raw)}
    problems = [
        f"{CONFIG_FILE}: {name} is {said[name]}, and only {value} can be trained here"
        for name, value in _REQUIRED.items()
        if said.get(name, value) not in (value, None)
    ]
    if "speculators_model_type" in raw:
        problems.append(f"{CONFIG_FILE} is in the speculators' format, not in that of EAGLE-3")
    missing = {"fc.weight", "lm_head.weight"} - tensors.keys()
    problems += [f"tensor {name} is missing" for name in sorted(missing)]
    if problems:
        raise DraftFormatError(str(folder), problems)
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    defaults = {
        "target_hidden_size": hidden,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads if isinstance(hidden, int) and heads else None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "draft_vocab_size": len(tensors["lm_head.weight"]),
    }
    given = {key: value for key, value in raw.items() if value is not None}
    own = {
        **defaults,
        **{key: value for key, value in given.items() if key in DraftModelConfig.model_fields},
        "rope_parameters": rope_parameters(given),
        "aux_layer_ids": _aux_layer_ids(folder, raw, target),
        "dtype": str(tensors["fc.weight"].dtype).removeprefix("torch."),
        "bos_token_id": target.bos_token_id,
        "eos_token_ids": target.eos_token_ids,
        "fc_norm": bool(said.get("fc_norm") or said.get("use_aux_norm")),
        "norm_output": bool(said.get("norm_output")),
    }
    try:
        return DraftModelConfig.model_validate(own)
    except ValidationError as error:
        raise DraftFormatError(str(folder), field_problems(error)) from error


def _eagle_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    found = raw.get("eagle_config")
    return found if isinstance(found, Mapping) else {}


def _aux_layer_ids(folder: Path, raw: Mapping[str, Any], target: TargetSpec) -> list[int]:
    """As SGLang's key has it (outputs of layers), else vLLM's (one more), else the default."""
    key = "eagle_aux_hidden_state_layer_ids"
    outputs, after = _eagle_config(raw).get(key), raw.get(key)
    if outputs and after and sorted(after) != [i + 1 for i in sorted(outputs)]:
        raise DraftFormatError(
            str(folder),
            [
                f"{CONFIG_FILE}: {key} is {after} at the top, where it counts layers passed, and "
                f"{outputs} in eagle_config, where it counts from 0: they must differ by one"
            ],
        )
    if outputs:
        return sorted(outputs)
    if after:
        return [i - 1 for i in sorted(after)]
    try:
        return list(aux_layer_ids(DraftConfig(), target))
    except ConfigError as error:
        raise DraftFormatError(
            str(folder), [f"{CONFIG_FILE} names no {key}, and {error.problem}"]
        ) from error


def _weight_problems(tensors: Mapping[str, Tensor], config: DraftModelConfig) -> list[str]:
    expected = expected_tensors(config)
    shapes = {name: list(t.shape) for name, t in expected.items() if name not in ("d2t", "t2d")}
    return [
        *name_problems(tensors, shapes),
        *(
            f"tensor {name} is {list(tensors[name].shape)}, its config says {shape}"
            for name, shape in sorted(shapes.items())
            if name in tensors and list(tensors[name].shape) != shape
        ),
        *value_problems(tensors),
    ]


def _pruning_problems(d2t: Tensor, t2d: Tensor | None, config: DraftModelConfig) -> list[str]:
    if len(d2t) != config.draft_vocab_size:
        return [f"tensor d2t has {len(d2t)} tokens, its config says {config.draft_vocab_size}"]
    if t2d is None:  # what it would be
        t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
        t2d[(torch.arange(len(d2t)) + d2t).clamp(0, config.vocab_size - 1)] = True
    return vocab_problems(d2t, t2d.bool())
