"""The checks and the plan that precede a training run: everything knowable is refused here.

Nothing in this module starts an actor, or reads a weight but those to be started from.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import find_path
from torchspec_lib.data.conversations import READERS
from torchspec_lib.errors import ConfigError
from torchspec_lib.plan import ClusterPlan, make_plan
from torchspec_lib.ray.capacity import Node, missing_resources, placement_error
from torchspec_lib.registry.hub import check_access
from torchspec_lib.results import DatasetManifest
from torchspec_lib.run_folder import continual_fingerprint
from torchspec_lib.target import TargetSpec, aux_layer_ids, read_target

logger = logging.getLogger(__name__)

PROCESS_BYTES = 600 << 20
"""Resident memory of a Python process with torch and transformers, before any weights."""


def preflight(run: RunConfig, nodes: Sequence[Node] | None = None) -> TargetSpec:
    """Check a configuration against the target and what will run it, in a second.

    Args:
        run: The configuration.
        nodes: What the cluster's nodes will have, where they aren't there yet. Otherwise it is
            this machine, or the cluster that RAY_ADDRESS names.

    Raises:
        ConfigError: A setting is impossible, with its full path and what to change.
        PlacementError: More GPUs are asked for than there are.
    """
    _check_data_root(run.data_path)
    check_access(run.registry)
    if run.cluster.placement.startswith("debug_"):
        raise ConfigError(
            "cluster.placement",
            f"{run.cluster.placement!r} runs one side alone, to measure it, and trains no draft",
            "Use 'separate' or 'colocate'",
        )
    for name in ("train", "heldout"):
        for index, source in enumerate(getattr(run.data, name)):
            if Path(source).suffix in READERS:
                find_path(source, f"data.{name}[{index}]")
    _check_evaluation(run)
    target = read_target(run.model)  # which may have to come from Hugging Face first
    aux_layer_ids(run.draft, target)
    _check_trees(run, target)
    if run.training.continual_from is not None:
        from torchspec_lib.training.continual import check_start  # torch, seconds

        continual_fingerprint(run.training.continual_path)
        check_start(run, target)
    _check_sizes(run, target)
    plan = make_plan(run, target, num_prompts=0, longest=run.data.max_length)
    _check_room(plan, nodes)
    return target


def provision(
    run: RunConfig, manifest: DatasetManifest, nodes: Sequence[Node] | None = None
) -> ClusterPlan:
    """Plan the cluster for a prepared data set, and check it as ``preflight`` does.

    Raises:
        ConfigError: A setting is impossible.
        PlacementError: The cluster can't hold the plan.
    """
    target = preflight(run, nodes)
    num_aside = run.snapshots.num_set_aside
    if 2 * num_aside > manifest.num_prompts:
        raise ConfigError(
            "snapshots.num_prompts",
            f"{num_aside} prompts set aside are more than half of all {manifest.num_prompts}",
            "Lower it, add conversations, or leave out snapshots",
        )
    plan = make_plan(run, target, manifest.num_prompts - num_aside, manifest.longest)
    _check_room(plan, nodes)
    return plan


def _check_data_root(root: Path) -> None:
    there = next(path for path in (root, *root.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError("data_root", f"{there} is a file", "Name a folder, or one to be made")
    if not os.access(there, os.W_OK | os.X_OK):
        problem = f"nothing can be written in {there}"
        raise ConfigError("data_root", problem, "Name another folder, or change its permissions")


def _check_sizes(run: RunConfig, target: TargetSpec) -> None:
    longest = target.max_position_embeddings
    positions = f"{longest} positions"
    if run.inference.engine == "sglang":
        longest -= 1
        positions += " allow: SGLang needs one for the token that it draws"
    if run.data.max_length > longest:
        raise ConfigError(
            "data.max_length",
            f"{run.data.max_length} tokens are more than the target's {positions}",
            f"Use at most {longest}",
        )
    if run.draft.vocab_size is not None and run.draft.vocab_size > target.vocab_size:
        raise ConfigError(
            "draft.vocab_size",
            f"{run.draft.vocab_size} is more than the target's {target.vocab_size} tokens",
            "Lower it, or leave it out for the whole vocabulary",
        )


def _check_evaluation(run: RunConfig) -> None:
    if run.evaluation.engine == "sglang" and run.cluster.device == "cpu":
        raise ConfigError(
            "evaluation.engine",
            "'sglang' can't draft on a CPU: its attention for CPUs has no EAGLE-3",
            "Set it to hf, or cluster.device to cuda",
        )


def _check_trees(run: RunConfig, target: TargetSpec) -> None:
    topk, num_tokens = run.evaluation.draft_topk, run.draft.vocab_size or target.vocab_size
    if topk > num_tokens:
        raise ConfigError(
            "evaluation.draft_topk", f"{topk} exceeds the draft's {num_tokens} tokens", "Lower it"
        )
    if topk > 1 and run.evaluation.engine == "hf":
        from transformers import AutoConfig  # seconds

        from torchspec_lib.evaluation.verification import check_tree_target

        remote = run.model.trust_remote_code
        check_tree_target(AutoConfig.from_pretrained(target.path, trust_remote_code=remote))


def _check_room(plan: ClusterPlan, nodes: Sequence[Node] | None) -> None:
    if nodes is None:
        _check_machine(plan)
    elif (missing := missing_resources(plan, nodes)) is not None:
        raise placement_error(plan, nodes, missing)


def _check_machine(plan: ClusterPlan) -> None:
    """Without RAY_ADDRESS everything runs on this machine, so its size is known."""
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    # Cores are shared by any number of actors, GPUs are not.
    machine = {"GPU": num_gpus, "CPU": sum(bundle.num_cpus for bundle in plan.bundles)}
    missing = missing_resources(plan, [machine])
    if missing is not None:
        raise placement_error(plan, [machine | {"CPU": os.cpu_count() or 1}], missing)
    needed = _host_bytes(plan)
    available = psutil.virtual_memory().available
    if needed > available:
        gib = 1 << 30
        raise ConfigError(
            "cluster",
            f"{len(plan.bundles)} actors and the store need some {needed / gib:.1f} GiB of memory, "
            f"{available / gib:.1f} GiB are free",
            "Use fewer trainer ranks or engines, a shorter data.max_length, or a smaller target",
        )


def _host_bytes(plan: ClusterPlan) -> int:
    """Host memory of a run on one node: processes, the store, and weights that aren't on a GPU."""
    num_decoders = sum("decoding" in bundle.roles for bundle in plan.bundles)
    num_engine_actors = max(plan.num_engines, len(plan.inference_bundles))
    num_actors = num_engine_actors + len(plan.training_bundles)
    num_targets = plan.num_engines + num_decoders
    weights = num_targets * plan.weight_bytes if plan.device == "cpu" else 0
    buffers = 4 * num_actors * plan.sample_bytes
    processes = (num_actors + num_decoders) * PROCESS_BYTES
    return processes + plan.segment_bytes + buffers + weights
