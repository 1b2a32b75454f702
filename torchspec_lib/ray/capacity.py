"""What a plan asks for against what a cluster's nodes have. Needs no Ray."""

from collections.abc import Mapping, Sequence

from torchspec_lib.errors import PlacementError
from torchspec_lib.plan import Bundle, ClusterPlan

Node = Mapping[str, float]
"""A node's resources, as Ray names them: ``{"CPU": 8.0, "GPU": 1.0}``."""


def missing_resources(plan: ClusterPlan, nodes: Sequence[Node]) -> str | None:
    """What the nodes lack for the plan even when nothing else runs; None if it can fit.

    A bundle is never split over nodes. The answer None is no promise: several bundles may
    still not share nodes of different sizes, which only placing them tells.

    Returns:
        Such as ``"1 GPU and 3 CPUs"``, or ``"a node with 4 GPUs and 4 CPUs"``.
    """
    gpus, cpus = (_missing(plan, nodes, name) for name in ("GPU", "CPU"))
    if gpus or cpus:
        return describe(gpus, cpus)
    for bundle in plan.bundles:
        if not any(_fits(bundle, node) for node in nodes):
            return f"a node with {describe(bundle.num_gpus, bundle.num_cpus)}"
    return None


def placement_error(plan: ClusterPlan, nodes: Sequence[Node], missing: str) -> PlacementError:
    """The error for a plan that doesn't fit: what it asks for, and what the nodes have."""
    asked = describe(_asked(plan, "GPU"), _asked(plan, "CPU"))
    return PlacementError(
        f"{asked} in {len(plan.bundles)} bundle(s) (cluster.placement {plan.placement})",
        f"{describe(_total(nodes, 'GPU'), _total(nodes, 'CPU'))} on {len(nodes)} node(s)",
        missing,
    )


def _missing(plan: ClusterPlan, nodes: Sequence[Node], name: str) -> int:
    """By how much all nodes together fall short of the plan in ``GPU`` or ``CPU``."""
    return max(_asked(plan, name) - _total(nodes, name), 0)


def describe(num_gpus: int, num_cpus: int) -> str:
    """Resources as a person reads them: ``1 GPU and 3 CPUs``."""
    amounts = [f"{num_gpus} GPU{'s' * (num_gpus != 1)}"]
    if num_cpus:
        amounts.append(f"{num_cpus} CPU{'s' * (num_cpus != 1)}")
    return " and ".join(amounts if num_gpus or not num_cpus else amounts[1:])


def _asked(plan: ClusterPlan, name: str) -> int:
    return plan.num_gpus if name == "GPU" else sum(bundle.num_cpus for bundle in plan.bundles)


def _total(nodes: Sequence[Node], name: str) -> int:
    return int(sum(node.get(name, 0.0) for node in nodes))


def _fits(bundle: Bundle, node: Node) -> bool:
    return bundle.num_gpus <= node.get("GPU", 0.0) and bundle.num_cpus <= node.get("CPU", 0.0)
