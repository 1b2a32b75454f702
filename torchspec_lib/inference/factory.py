"""Builds an engine by its name in the configuration, inside the actor that will run it."""

from dataclasses import dataclass

import torch

from torchspec_lib.config import RunConfig
from torchspec_lib.inference.engine.base import InferenceEngine
from torchspec_lib.inference.engine.hf_engine import HFEngine
from torchspec_lib.target import TargetSpec, aux_layer_ids
from torchspec_lib.transfer.store import StoreAddress, TensorStore


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine actor is built from."""

    run: RunConfig
    target: TargetSpec
    rank: int
    store_address: StoreAddress


def build_engine(spec: EngineSpec, store: TensorStore, device: torch.device) -> InferenceEngine:
    """The engine that ``inference.engine`` names, ready to capture."""
    run = spec.run
    return HFEngine.load(
        spec.target,
        aux_layer_ids(run.draft, spec.target),
        store,
        run.model.dtype,
        device,
        run.model.trust_remote_code,
    )
