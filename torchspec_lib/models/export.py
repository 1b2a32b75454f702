"""The folder that SGLang and vLLM serve a draft from: written, read back and checked.

``config.json`` and ``model.safetensors``. ``d2t`` [Vd] holds offsets (target id = j + d2t[j]),
``t2d`` [V] says which target ids have a draft id. SGLang skips an unknown tensor without a
word, and vLLM refuses it: so the set of names is compared here.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchspec_lib.errors import DraftFormatError
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.eagle3 import Eagle3Draft
from torchspec_lib.target import TargetSpec

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class LoadedDraft:
    """A draft as an engine would load it: in the exported dtype, on the CPU, in eval mode."""

    draft: Eagle3Draft
    config: DraftModelConfig
    draft_vocab: npt.NDArray[np.int64] | None
    """Ascending target ids of the draft vocabulary, [Vd]; None if it is the target's whole."""


def save_draft(
    folder: Path,
    state_dict: Mapping[str, Tensor],
    config: DraftModelConfig,
    draft_vocab: npt.NDArray[np.int64] | None,
) -> None:
    """Export a draft; the folder appears whole or not at all, and replaces an older one.

    Args:
        folder: Its parent is made if need be.
        state_dict: ``Eagle3Draft.state_dict()``, whole tensors of any float dtype.
        config: Its ``dtype`` is what the weights are written in.
        draft_vocab: Ascending target ids; required exactly if the vocabulary is pruned.

    Raises:
        DraftFormatError: The tensors or the vocabulary don't fit ``config``.
    """
    dtype = getattr(torch, config.dtype)
    tensors = {name: _plain(tensor, dtype) for name, tensor in state_dict.items()}
    if draft_vocab is not None and config.is_pruned:
        tensors |= _vocab_tensors(draft_vocab, config.vocab_size)
    problems = _tensor_problems(tensors, config)
    if problems:
        raise DraftFormatError(str(folder), problems)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "draft"
        fresh.mkdir()
        save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        (fresh / CONFIG_FILE).write_text(json.dumps(config.to_serving_json(), indent=2) + "\n")
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        fresh.rename(folder)


def load_draft(folder: Path) -> LoadedDraft:
    """Read an exported draft.

    Raises:
        DraftFormatError: A file is missing or broken, or they contradict each other.
    """
    config, raw, tensors = _read(folder)
    problems = _config_problems(config, raw) + _tensor_problems(tensors, config)
    if problems:
        raise DraftFormatError(str(folder), problems)
    draft_vocab = None
    if config.is_pruned:
        draft_vocab = (torch.arange(config.draft_vocab_size) + tensors.pop("d2t")).numpy()
        del tensors["t2d"]
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    draft.load_state_dict(tensors, assign=True)
    return LoadedDraft(draft.eval(), config, draft_vocab)


def validate_draft(folder: Path, target: TargetSpec) -> None:
    """Check that both engines would serve this draft with this target, and serve it right.

    Raises:
        DraftFormatError: It lists every problem that was found.
    """
    config, raw, tensors = _read(folder)
    problems = [
        *_config_problems(config, raw),
        *_target_problems(config, target),
        *_tensor_problems(tensors, config),
    ]
    if problems:
        raise DraftFormatError(str(folder), problems)


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _vocab_tensors(draft_vocab: npt.NDArray[np.int64], vocab_size: int) -> dict[str, Tensor]:
    target_ids = torch.from_numpy(draft_vocab.astype(np.int64))
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    return {"d2t": target_ids - torch.arange(len(target_ids)), "t2d": t2d}


def _read(folder: Path) -> tuple[DraftModelConfig, dict[str, Any], dict[str, Tensor]]:
    """The parsed config, the config as it stands, and all tensors."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise DraftFormatError(str(folder), [f"{name} is missing" for name in missing])
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text())
        config = DraftModelConfig.from_serving_json(raw)
    except json.JSONDecodeError as error:
        raise DraftFormatError(str(folder), [f"{CONFIG_FILE}: {error}"]) from error
    except ValidationError as error:
        problems = [
            f"{CONFIG_FILE}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
        ]
        raise DraftFormatError(str(folder), problems) from error
    try:
        return config, raw, load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise DraftFormatError(str(folder), [f"{WEIGHTS_FILE}: {error}"]) from error


def _config_problems(config: DraftModelConfig, raw: Mapping[str, Any]) -> list[str]:
    """Where the file isn't what this very config would be written as: it tells two stories."""
    return [
        f"{CONFIG_FILE}: {key} is {json.dumps(raw.get(key, 'missing'))}, not {json.dumps(value)}"
        for key, value in config.to_serving_json().items()
        if key not in raw or raw[key] != value
    ]


def _target_problems(config: DraftModelConfig, target: TargetSpec) -> list[str]:
    """Where the draft was made for another target."""
    expected = {
        "hidden_size": target.hidden_size,
        "target_hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "bos_token_id": target.bos_token_id,
        "eos_token_ids": target.eos_token_ids,
    }
    problems = [
        f"{CONFIG_FILE}: {name} is {getattr(config, name)}, the target's is {value}"
        for name, value in expected.items()
        if getattr(config, name) != value
    ]
    if config.max_position_embeddings < target.max_position_embeddings:
        problems.append(
            f"{CONFIG_FILE}: max_position_embeddings is {config.max_position_embeddings}, below "
            f"the target's {target.max_position_embeddings}"
        )
    if config.aux_layer_ids[-1] >= target.num_layers:
        problems.append(
            f"{CONFIG_FILE}: auxiliary layer {config.aux_layer_ids[-1]} doesn't exist, the target "
            f"has {target.num_layers} layers"
        )
    return problems


def _tensor_problems(tensors: Mapping[str, Tensor], config: DraftModelConfig) -> list[str]:
    expected = _expected_tensors(config)
    problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected tensor {name}" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        found, wanted = tensors[name], expected[name]
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            problems.append(
                f"tensor {name} is {found.dtype} {list(found.shape)}, "
                f"not {wanted.dtype} {list(wanted.shape)}"
            )
        elif found.dtype.is_floating_point and not found.isfinite().all():
            problems.append(f"tensor {name} has values that aren't finite")
    if not problems and config.is_pruned:
        problems += _vocab_problems(tensors["d2t"], tensors["t2d"])
    return problems


def _expected_tensors(config: DraftModelConfig) -> dict[str, Tensor]:
    """Name, shape and dtype of every tensor, as tensors without storage."""
    with torch.device("meta"):
        expected = dict(Eagle3Draft(config).to(getattr(torch, config.dtype)).state_dict())
        if config.is_pruned:
            expected["d2t"] = torch.empty(config.draft_vocab_size, dtype=torch.int64)
            expected["t2d"] = torch.empty(config.vocab_size, dtype=torch.bool)
    return expected


def _vocab_problems(d2t: Tensor, t2d: Tensor) -> list[str]:
    target_ids = torch.arange(len(d2t)) + d2t
    if target_ids.min() < 0 or target_ids.max() >= len(t2d) or (target_ids.diff() <= 0).any():
        return ["tensor d2t doesn't lead to ascending target ids: it must hold offsets, not ids"]
    if not torch.equal(t2d.nonzero()[:, 0], target_ids):
        return [f"tensor t2d marks {int(t2d.sum())} target ids, others than d2t leads to"]
    return []
