"""The two files of a draft folder, read as they stand.

``config.json`` and ``model.safetensors``. ``d2t`` [Vd] holds offsets (target id = j + d2t[j]),
``t2d`` [V] says which target ids have a draft id.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from torchspec_lib.errors import DraftFormatError
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.eagle3 import Eagle3Draft

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class DraftFiles:
    """What a folder holds, unchecked but for the config's fields."""

    config: DraftModelConfig
    raw: Mapping[str, Any]
    """``config.json`` as it stands."""
    tensors: dict[str, Tensor]


def read_draft(folder: Path) -> DraftFiles:
    """Read a folder in our own format.

    Raises:
        DraftFormatError: A file is missing or broken, or a field of the config is impossible.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise DraftFormatError(str(folder), [f"{name} is missing" for name in missing])
    raw = read_config(folder)
    try:
        config = DraftModelConfig.from_serving_json(raw)
    except ValidationError as error:
        raise DraftFormatError(str(folder), field_problems(error)) from error
    return DraftFiles(config, raw, read_tensors(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``, which must be there.

    Raises:
        DraftFormatError: It isn't an object in JSON.
    """
    try:
        raw = json.loads((folder / CONFIG_FILE).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DraftFormatError(str(folder), [f"{CONFIG_FILE} is no JSON: {error}"]) from error
    if not isinstance(raw, dict):
        raise DraftFormatError(str(folder), [f"{CONFIG_FILE} holds no JSON object"])
    return raw


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All of ``model.safetensors``, which must be there.

    Raises:
        DraftFormatError: It is damaged.
    """
    try:
        return load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise DraftFormatError(str(folder), [f"{WEIGHTS_FILE}: {error}"]) from error


def field_problems(error: ValidationError) -> list[str]:
    """What is wrong with a config, a line for each field."""
    return [
        f"{CONFIG_FILE}: {'.'.join(map(str, e['loc'])) or 'as a whole'}: {e['msg']}"
        for e in error.errors()
    ]


def expected_tensors(config: DraftModelConfig) -> dict[str, Tensor]:
    """Name, shape and dtype of every tensor of a folder, as tensors without storage."""
    with torch.device("meta"):
        expected = dict(Eagle3Draft(config).to(getattr(torch, config.dtype)).state_dict())
        if config.is_pruned:
            expected["d2t"] = torch.empty(config.draft_vocab_size, dtype=torch.int64)
            expected["t2d"] = torch.empty(config.vocab_size, dtype=torch.bool)
    return expected
