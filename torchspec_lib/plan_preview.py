"""Shows where a run's actors would go, without a cluster: ``python -m torchspec_lib.plan_preview``.

Nodes are taken to be empty and alike; bundles are packed as Ray packs them, first the training
group's, then the inference group's.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import ValidationError

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import ConfigError, UserError
from torchspec_lib.plan import Bundle, bundles_of, decoding_bundles_of

DECODER = "decoder of snapshots"


@dataclass(slots=True)
class Node:
    """A node's GPUs (without GPUs: cores), and what has them."""

    num_units: int
    actors: list[tuple[int, str]] = field(default_factory=list)
    """Units and name of each."""

    @property
    def num_free(self) -> int:
        return self.num_units - sum(units for units, _ in self.actors)


def preview(run: RunConfig, units_per_node: int | None = None) -> list[Node]:
    """Place a run's bundles on as many nodes as they need.

    ``units_per_node``: GPUs (without GPUs: cores) of a node; by default as many as the
    configuration uses on one.

    Raises:
        ConfigError: A bundle doesn't fit on a node.
    """
    training, inference = bundles_of(run)
    decoding = decoding_bundles_of(run)
    names = [*_training_names(training), *_engine_names(run, inference)]
    names += [DECODER] * len(decoding)
    bundles = [*training, *inference, *decoding]
    on_gpu = run.cluster.device == "cuda"
    sizes = [bundle.num_gpus if on_gpu else bundle.num_cpus for bundle in bundles]
    if units_per_node is None:
        used = [run.training.training_num_gpus_per_node] if training else []
        used += [run.inference.inference_num_gpus_per_node] if inference and on_gpu else []
        units_per_node = max([*used, *sizes])
    nodes: list[Node] = []
    for size, name in zip(sizes, names, strict=True):
        if size > units_per_node:
            raise ConfigError(
                "inference.inference_num_gpus_per_node",
                f"{name} needs {size} on one node, which has {units_per_node}",
                "Raise inference.sglang.nnodes",
            )
        home = next((node for node in nodes if node.num_free >= size), None)
        if home is None:
            home = Node(units_per_node)
            nodes.append(home)
        home.actors.append((size, name))
    return nodes


def _training_names(bundles: Sequence[Bundle]) -> list[str]:
    names = []
    for rank, bundle in enumerate(bundles):
        beside = {"inference": f"engine {rank}", "decoding": DECODER}
        others = [beside[role] for role in bundle.roles if role in beside]
        names.append(f"trainer rank {rank}" + (f" with {' and '.join(others)}" if others else ""))
    return names


def _engine_names(run: RunConfig, bundles: Sequence[Bundle]) -> list[str]:
    parts = run.inference.num_nodes_per_engine
    if parts == 1:
        return [f"engine {rank}" for rank in range(len(bundles))]
    roles = ["answers", *("computes" for _ in range(1, parts))]
    return [
        f"engine {i // parts}, part {i % parts + 1} of {parts}, {roles[i % parts]}"
        for i in range(len(bundles))
    ]


def describe(run: RunConfig, nodes: Sequence[Node]) -> str:
    """A line a node and one for each actor on it."""
    unit = "GPU" if run.cluster.device == "cuda" else "core"
    lines = []
    for number, node in enumerate(nodes):
        lines.append(f"node {number}: {node.num_units} {unit}s, {node.num_free} free")
        first = 0
        for size, name in node.actors:
            units = f"{unit} {first}" if size == 1 else f"{unit}s {first}-{first + size - 1}"
            lines.append(f"  {units:<12}{name}")
            first += size
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read a configuration as ``pyflyte run`` takes it, and print the placement."""
    parser = argparse.ArgumentParser(prog="torchspec_lib.plan_preview", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML with the settings under 'run'")
    parser.add_argument("--units-per-node", type=int, help="GPUs, or without GPUs cores, of a node")
    given = parser.parse_args(arguments)
    try:
        run = RunConfig.model_validate(yaml.safe_load(given.config.read_text())["run"])
        text = describe(run, preview(run, given.units_per_node))
    except (ValidationError, UserError) as error:
        sys.stderr.write(f"{given.config}: {error}\n")
        return 2
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
