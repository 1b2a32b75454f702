"""What there is to know of a target model before any of its weights are read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchspec_lib.config.models import DraftConfig, ModelConfig
from torchspec_lib.config.settings import Settings, find_path
from torchspec_lib.errors import ConfigError

_NUM_BLOCKS = 33
_BLOCK_BYTES = 64 << 10


class TargetSpec(Settings):
    """The target's sizes, from its ``config.json``."""

    path: str
    """The folder with its files; for a Hugging Face id the local snapshot."""
    fingerprint: str
    """Identifies the target: 16 hex digits over its files' names, sizes and blocks of content."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    rope_parameters: dict[str, Any]
    """As transformers 5 writes it: ``rope_type``, ``rope_theta`` and the type's own fields."""
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def read_target(model: ModelConfig) -> TargetSpec:
    """Read the target's description; a folder's without importing transformers.

    Raises:
        ConfigError: The folder or the id doesn't exist, or its config lacks a field.
    """
    folder = _locate(model)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ConfigError("model.target", f"{folder} has no config.json", "Name a model's folder")
    raw = json.loads(config_file.read_text())
    config = raw.get("text_config", raw)
    try:
        heads = config["num_attention_heads"]
        return TargetSpec(
            path=str(folder),
            fingerprint=_fingerprint(folder),
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config["rms_norm_eps"],
            hidden_act=config.get("hidden_act", "silu"),
            rope_parameters=rope_parameters(config),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=_eos_token_ids(folder, config),
        )
    except KeyError as error:
        raise ConfigError(
            "model.target",
            f"{config_file} lacks {error}",
            "Only decoder models with a Llama-style config are supported",
        ) from error


def aux_layer_ids(draft: DraftConfig, target: TargetSpec) -> tuple[int, ...]:
    """The target layers that the draft reads; by default ``1, N//2 - 1, N - 4`` of N layers.

    Raises:
        ConfigError: An id lies outside the target, or it is too shallow for the default.
    """
    num_layers = target.num_layers
    if draft.aux_layer_ids is None:
        default = (1, num_layers // 2 - 1, num_layers - 4)
        if list(default) != sorted(set(default)) or default[0] < 0:
            raise ConfigError(
                "draft.aux_layer_ids",
                f"the target's {num_layers} layers are too few for the default {list(default)}",
                f"Set ascending ids within 0..{num_layers - 1}",
            )
        return default
    if draft.aux_layer_ids[-1] >= num_layers:
        raise ConfigError(
            "draft.aux_layer_ids",
            f"layer {draft.aux_layer_ids[-1]} doesn't exist, the target has {num_layers} layers",
            f"Use ids within 0..{num_layers - 1}",
        )
    return draft.aux_layer_ids


def _locate(model: ModelConfig) -> Path:
    """The target's folder; a Hugging Face id is fetched, its weights included."""
    looks_like_id = model.target.count("/") == 1 and not model.target.startswith((".", "/", "~"))
    try:
        return find_path(model.target, "model.target")
    except ConfigError:
        if not looks_like_id:
            raise
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        patterns += ["*.py"] if model.trust_remote_code else []
        return Path(snapshot_download(model.target, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            "model.target",
            f"{model.target!r} is no folder here, and Hugging Face has no such model or can't be "
            f"reached ({type(error).__name__})",
            "Correct it, or log in with HF_TOKEN if the model is gated",
        ) from error


def _fingerprint(folder: Path) -> str:
    """Hash the small files whole, and blocks spread over the weights: they can be terabytes."""
    digest = hashlib.sha256()
    suffixes = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    for path in sorted(p for p in folder.iterdir() if p.suffix in suffixes):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for block in range(_NUM_BLOCKS):
                file.seek(block * max(size - _BLOCK_BYTES, 0) // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """One form for both: transformers 5's ``rope_parameters``, and the older pair of fields."""
    if "rope_parameters" in config:
        return dict(config["rope_parameters"])
    scaling = dict(config.get("rope_scaling") or {})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0), **scaling}


def _eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    eos = config.get("eos_token_id")
    if generation.is_file():
        eos = json.loads(generation.read_text()).get("eos_token_id", eos)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
