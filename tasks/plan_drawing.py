"""A drawing of a cluster plan: nodes, and who sits on them."""

import math
from collections.abc import Sequence

from tasks.report_page import box, flow, node_box, note, rest_box, size
from torchspec_lib.plan import Bundle, ClusterPlan
from torchspec_lib.ray.capacity import describe

MAX_NODES = 4
"""More nodes of a kind than this are not all drawn."""


def drawing(plan: ClusterPlan) -> str:
    """The nodes that capture, the store, and the nodes that train; in colocation they are one."""
    amounts = f"{size(plan.segment_bytes)}, {size(plan.max_in_flight_bytes)} in flight"
    store = [box("store", "Mooncake store", amounts)]
    if plan.placement == "colocate":
        names = [
            f"rank {i} + engine {i}" + (" + decoder" if "decoding" in bundle.roles else "")
            for i, bundle in enumerate(plan.training_bundles)
        ]
        shared = _nodes("shared", "node", names, plan.training_bundles, plan.training_num_nodes)
        return flow(shared, store, arrow="⇄") + note(
            "A trainer rank and an engine share each GPU"
            if plan.num_gpus
            else "A trainer rank and an engine share each bundle of cores"
        )
    ranks = [f"trainer rank {i}" for i in range(len(plan.training_bundles))]
    parts = len(plan.inference_bundles) // plan.num_engines
    engines = [
        f"engine {i // parts}" + (f", part {i % parts + 1} of {parts}" if parts > 1 else "")
        for i in range(len(plan.inference_bundles))
    ]
    return flow(
        _nodes(
            "engine", "inference node", engines, plan.inference_bundles, plan.inference_num_nodes
        ),
        store,
        _nodes("trainer", "training node", ranks, plan.training_bundles, plan.training_num_nodes)
        + _decoders(plan),
    )


def _decoders(plan: ClusterPlan) -> list[str]:
    """What decodes snapshots of the draft, if anything does."""
    bundles, names = plan.decoding_bundles, ["decoder of snapshots"] * len(plan.decoding_bundles)
    return _nodes("engine", "decoding node", names, bundles, len(bundles)) if bundles else []


def _nodes(
    kind: str, node: str, names: Sequence[str], bundles: Sequence[Bundle], num_nodes: int
) -> list[str]:
    """Actors over as many nodes, each as full as the others but for the last."""
    per_node = math.ceil(len(names) / num_nodes)
    num_drawn = num_nodes if num_nodes <= MAX_NODES else MAX_NODES - 1
    drawn = []
    for i in range(num_drawn):
        here = range(i * per_node, min((i + 1) * per_node, len(names)))
        label = f"{node} {i + 1}" if num_nodes > 1 else node
        drawn.append(
            node_box(
                f"{label}: {_resources([bundles[k] for k in here])}",
                [box(kind, names[k], _resources([bundles[k]])) for k in here],
            )
        )
    if num_drawn < num_nodes:
        first = names[num_drawn * per_node]
        drawn.append(
            rest_box(f"{num_nodes - num_drawn} more like these, with {first} to {names[-1]}")
        )
    return drawn


def _resources(bundles: Sequence[Bundle]) -> str:
    return describe(sum(bundle.num_gpus for bundle in bundles), cores(bundles))


def cores(bundles: Sequence[Bundle]) -> int:
    """CPU cores of all of them."""
    return sum(bundle.num_cpus for bundle in bundles)
