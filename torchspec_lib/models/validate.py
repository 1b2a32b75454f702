"""Whether SGLang and vLLM serve a draft folder, and serve it right, check by check.

``python -m torchspec_lib.models.validate FOLDER [--target MODEL]`` prints the verdict. SGLang
skips an unknown tensor without a word and doesn't miss one, and vLLM refuses both: so the set of
names is compared here.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec_lib import logs
from torchspec_lib.config.models import ModelConfig
from torchspec_lib.errors import DraftFormatError, TorchSpecError
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.draft_files import CONFIG_FILE, expected_tensors, read_draft
from torchspec_lib.target import TargetSpec, read_target

_VLLM_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, and what is wrong with it."""

    name: str
    problems: tuple[str, ...]


def check_draft_folder(folder: Path, target: TargetSpec | None = None) -> list[Check]:
    """Look at everything that decides whether the engines serve a draft right.

    Args:
        folder: An exported draft.
        target: What it is served with; nothing is compared with it if left out.

    Returns:
        The checks in the order of what they look at; a folder that can't be read has one.
    """
    try:
        files = read_draft(folder)
    except DraftFormatError as error:
        return [Check("files", tuple(error.problems))]
    config, tensors = files.config, files.tensors
    expected = expected_tensors(config)
    found = {
        "files": [],
        "config fields, auxiliary layers in both conventions": _config_problems(config, files.raw),
        # A name that isn't ours is told once, and not again in vLLM's words.
        "tensor names, ours and by vLLM's rules": name_problems(tensors, expected)
        or _vllm_problems(tensors, config),
        "shapes and dtypes": _shape_problems(tensors, expected),
        "values finite": value_problems(tensors),
        "draft vocabulary (d2t, t2d)": _vocab_problems(tensors, expected),
    }
    if target is not None:
        found["the target's sizes, tokens and layers"] = _target_problems(config, target)
    return [Check(name, tuple(problems)) for name, problems in found.items()]


def validate_draft(folder: Path, target: TargetSpec | None = None) -> None:
    """Check that both engines would serve this draft (with this target), and serve it right.

    Raises:
        DraftFormatError: It lists every problem that was found.
    """
    problems = [p for check in check_draft_folder(folder, target) for p in check.problems]
    if problems:
        raise DraftFormatError(str(folder), problems)


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


def name_problems(found: Iterable[str], expected: Iterable[str]) -> list[str]:
    """Tensors that are missing, and those that shouldn't be there."""
    missing, unexpected = set(expected) - set(found), set(found) - set(expected)
    return [
        *(f"tensor {name} is missing" for name in sorted(missing)),
        *(f"unexpected tensor {name}" for name in sorted(unexpected)),
    ]


def _vllm_problems(names: Iterable[str], config: DraftModelConfig) -> list[str]:
    """By the rules of its ``Eagle3LlamaForCausalLM``: rename, fuse, then all must be there.

    ``t2d`` is skipped and ``d2t`` renamed; the embedding is the target's, where there is none.
    """
    layer = {
        *("input_layernorm", "hidden_norm", "post_attention_layernorm"),
        *("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    }
    parameters = {"lm_head.weight", "model.fc.weight", "model.norm.weight"}
    parameters |= {f"model.layers.0.{name}.weight" for name in layer}
    if config.is_pruned:
        parameters.add("draft_id_to_target_id")
    if config.fc_norm:
        num_states = len(config.aux_layer_ids)
        parameters |= {f"model.fc_norm.{i}.weight" for i in range(num_states)}
    loaded = {_vllm_name(name) for name in names if "t2d" not in name}
    loaded.discard("model.embed_tokens.weight")
    return [f"vLLM: {problem}" for problem in name_problems(loaded, parameters)]


def _vllm_name(name: str) -> str:
    if "d2t" in name:
        return name.replace("d2t", "draft_id_to_target_id")
    parts = name.replace("midlayer.", "layers.0.").split(".")
    fused = ".".join(_VLLM_FUSED.get(part, part) for part in parts)
    return fused if parts[0] in ("lm_head", "model") else f"model.{fused}"


def _shape_problems(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return [
        f"tensor {name} is {tensors[name].dtype} {list(tensors[name].shape)}, "
        f"not {wanted.dtype} {list(wanted.shape)}"
        for name, wanted in sorted(expected.items())
        if name in tensors
        and (tensors[name].shape, tensors[name].dtype) != (wanted.shape, wanted.dtype)
    ]


def value_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors that no training and no engine can go on with."""
    return [
        f"tensor {name} has values that aren't finite"
        for name, tensor in sorted(tensors.items())
        if tensor.dtype.is_floating_point and not tensor.isfinite().all()
    ]


def _vocab_problems(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Nothing where there are no such tensors, or of no such shape: that is told already."""
    names = {"d2t", "t2d"} & expected.keys()
    broken = _shape_problems(tensors, {name: expected[name] for name in names})
    if not names or not names <= tensors.keys() or broken:
        return []
    return vocab_problems(tensors["d2t"], tensors["t2d"])


def vocab_problems(d2t: Tensor, t2d: Tensor) -> list[str]:
    """Where a draft vocabulary contradicts itself; ``d2t`` int64 [Vd], ``t2d`` bool [V]."""
    target_ids = torch.arange(len(d2t)) + d2t
    if target_ids.min() < 0 or target_ids.max() >= len(t2d) or (target_ids.diff() <= 0).any():
        return ["tensor d2t doesn't lead to ascending target ids: it must hold offsets, not ids"]
    if not torch.equal(t2d.nonzero()[:, 0], target_ids):
        return [f"tensor t2d marks {int(t2d.sum())} target ids, others than d2t leads to"]
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a verdict on the folder that the command line names; 1 if it isn't good."""
    parser = argparse.ArgumentParser(prog="torchspec_lib.models.validate", description=__doc__)
    parser.add_argument("folder", type=Path, help="an exported draft")
    parser.add_argument("--target", help="its target: a Hugging Face model id, or a folder")
    given = parser.parse_args(arguments)
    logs.setup("validate")

    def say(what: str, found: str) -> None:
        sys.stdout.write(f"{what:<54}{found}\n")

    try:
        target = read_target(ModelConfig(target=given.target)) if given.target else None
    except TorchSpecError as error:
        say("verdict", f"no: {error}")
        return 1
    checks = check_draft_folder(given.folder, target)
    for check in checks:
        say(check.name, "ok" if not check.problems else f"{len(check.problems)} wrong")
        for problem in check.problems:
            sys.stdout.write(f"  {problem}\n")
    if any(check.problems for check in checks):
        say("verdict", "no")
        return 1
    say("verdict", "yes" if target else "yes, as far as can be told without --target")
    return 0


if __name__ == "__main__":
    sys.exit(main())
