"""Builds an engine by its name in the configuration, inside the actor that will run it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from torchspec_lib.config.run import RunConfig
from torchspec_lib.inference.engine.base import InferenceEngine
from torchspec_lib.inference.engine.hf_engine import HFEngine
from torchspec_lib.inference.engine.sgl_arguments import WHOLE, Part, engine_arguments
from torchspec_lib.inference.engine.sgl_cpu import choose_cpu
from torchspec_lib.inference.engine.sgl_memory import colocated_fraction
from torchspec_lib.target import TargetSpec, aux_layer_ids
from torchspec_lib.transfer.store import StoreAddress, TensorStore

if TYPE_CHECKING:
    from torchspec_lib.inference.engine.sgl_engine import SglPart
    from torchspec_lib.inference.engine_parts import EngineParts


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine actor is built from."""

    run: RunConfig
    target: TargetSpec
    rank: int
    """The engine's."""
    store_address: StoreAddress
    part: Part = WHOLE
    """Which part of the engine, if that has several nodes."""


def build_engine(
    spec: EngineSpec,
    store: TensorStore,
    device: torch.device,
    attach: Callable[[], TensorStore],
    others: "EngineParts | None" = None,
) -> InferenceEngine:
    """The engine that ``inference.engine`` names, ready to capture.

    Args:
        spec: What to build.
        store: The actor's connection to the store.
        device: For engines that run in this process.
        attach: Connects another process of this node to the store. Picklable; for ``sglang``.
        others: The engine's parts on other nodes, if it has any.

    Raises:
        EngineError: It doesn't start.
        DependencyError: Its library isn't installed.
    """
    run = spec.run
    layers = aux_layer_ids(run.draft, spec.target)
    if run.inference.engine == "sglang":
        return _sgl_engine(spec, layers, store, attach, others)
    return HFEngine.load(
        spec.target, layers, store, run.model.dtype, device, run.model.trust_remote_code
    )


def build_part(spec: EngineSpec) -> "SglPart":
    """The part of an engine on another node than its first, ready to compute.

    Raises:
        EngineError: It doesn't start.
        DependencyError: SGLang isn't installed.
    """
    from torchspec_lib.inference.engine.sgl_engine import SglPart

    return SglPart(aux_layer_ids(spec.run.draft, spec.target), _sgl_arguments(spec))


def _sgl_engine(
    spec: EngineSpec,
    layers: tuple[int, ...],
    store: TensorStore,
    attach: Callable[[], TensorStore],
    others: "EngineParts | None",
) -> InferenceEngine:
    # Imported here: what SGLang changes of a process is for its own actor alone.
    from torchspec_lib.inference.engine.sgl_engine import SglEngine

    if others is None:
        return SglEngine(spec.target, layers, store, attach, _sgl_arguments(spec))
    with others.meeting() as part:
        arguments = _sgl_arguments(replace(spec, part=part))
        engine = SglEngine(spec.target, layers, store, attach, arguments)
    others.watch(engine.fail)
    return engine


def _sgl_arguments(spec: EngineSpec) -> dict[str, Any]:
    run = spec.run
    arguments = engine_arguments(run, spec.target, spec.part)
    if run.cluster.device == "cpu":
        num_ranks = run.inference.num_gpus_per_engine
        num_local = num_ranks // run.inference.num_nodes_per_engine
        choose_cpu(num_ranks, first_rank=spec.part.node_rank * num_local)
    elif run.cluster.placement == "colocate":
        free_bytes, gpu_bytes = torch.cuda.mem_get_info()
        max_total_tokens = arguments["max_total_tokens"]
        fraction = colocated_fraction(run, spec.target, max_total_tokens, gpu_bytes, free_bytes)
        arguments.setdefault("mem_fraction_static", fraction)
    return arguments
