"""What a training is made of: the state that every step changes, and what that depends on."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchspec_lib.config.run import RunConfig
from torchspec_lib.target import TargetSpec, aux_layer_ids

_MISSING = "nothing"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a step changes, besides this rank's random state."""

    model: nn.Module
    """Sharded by FSDP."""
    optimizer: Optimizer
    scheduler: LRScheduler

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds, as views; the random state under this rank's own name."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        random = {str(dist.get_rank()): _random_state()}
        return {"model": model, "optimizer": optimizer, "random": random}

    def set_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Take over what ``tensors()`` has given; a random state only if there is this rank's."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
        if "random" in tensors:
            _set_random_state(tensors["random"][str(dist.get_rank())])

    def schedule(self) -> dict[str, Any]:
        """Where the learning rate's schedule stands; JSON-able, and a copy."""
        return copy.deepcopy(self.scheduler.state_dict())


def run_identity(
    run: RunConfig,
    target: TargetSpec,
    dataset_id: str,
    draft_vocab: npt.NDArray[np.int64] | None,
) -> dict[str, Any]:
    """What a state depends on: all but the number of ranks and what only costs time.

    Flat, such as ``{"training.betas": [0.9, 0.95]}``, and JSON-able.
    """
    settings = run.decisive_settings()
    settings["draft"] |= {
        "aux_layer_ids": aux_layer_ids(run.draft, target),
        "vocabulary": vocabulary_id(draft_vocab),
    }
    settings["model"] |= {"target": target.fingerprint}
    return _flatten({"data": dataset_id, **settings})


def vocabulary_id(draft_vocab: npt.NDArray[np.int64] | None) -> str:
    """Identifies a draft vocabulary: 16 hex digits, or ``all`` for the target's whole."""
    if draft_vocab is None:
        return "all"
    return hashlib.sha256(draft_vocab.astype(np.int64).tobytes()).hexdigest()[:16]


def identity_differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Where two identities differ, in words."""
    return [
        f"{key} is {saved.get(key, _MISSING)!r} there and {own.get(key, _MISSING)!r} here"
        for key in sorted(saved.keys() | own.keys())
        if saved.get(key, _MISSING) != own.get(key, _MISSING)
    ]


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat
