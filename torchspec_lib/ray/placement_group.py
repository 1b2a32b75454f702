"""Where actors go: reserved bundles, each known by its node and its GPUs."""

import ipaddress
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from torchspec_lib.plan import Bundle, ClusterPlan, Role
from torchspec_lib.ray.capacity import placement_error
from torchspec_lib.ray.cluster import _wait_for_gpu_resources, living_nodes
from torchspec_lib.ray.failures import get

MIN_RESERVE_S = 5.0
"""For reserving what was seen to be there, however long its arrival was waited for."""
PROBE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Slot:
    """One reserved bundle, and where it turned out to be."""

    group: PlacementGroup
    bundle_index: int
    bundle: Bundle
    node_ip: str
    node_id: str
    gpu_ids: tuple[str, ...]

    def options(self, role: Role) -> dict[str, Any]:
        """What to hand ``.options()`` of an actor of that role.

        The roles of a bundle share it evenly: in colocation such as half a GPU and a core each.
        """
        assert role in self.bundle.roles, f"a bundle for {self.bundle.roles}, not for {role}"
        num_roles = len(self.bundle.roles)
        return {
            "num_cpus": self.bundle.num_cpus / num_roles,
            "num_gpus": self.bundle.num_gpus / num_roles,
            "scheduling_strategy": _bundle_strategy(self.group, self.bundle_index),
        }


@dataclass(frozen=True, slots=True)
class Placement:
    """A run's slots, one for every actor of a role, ordered by node and GPU.

    In colocation the same slots serve several roles.
    """

    training: tuple[Slot, ...]
    inference: tuple[Slot, ...]
    groups: tuple[PlacementGroup, ...]
    decoding: tuple[Slot, ...] = ()

    def engines(self, num_parts: int) -> list[tuple[Slot, ...]]:
        """The slots of each engine, one for each of its parts: neighbours, the first answers."""
        firsts = range(0, len(self.inference), num_parts)
        return [self.inference[first : first + num_parts] for first in firsts]

    def remove(self) -> None:
        """Give the bundles back; what still runs in them is killed."""
        for group in self.groups:
            remove_placement_group(group)


class InfoActor:
    """A probe that says where its bundle is."""

    def where(self) -> tuple[str, str, tuple[str, ...]]:
        """Node IP, node id and GPU ids."""
        context = ray.get_runtime_context()
        gpu_ids = tuple(sorted(context.get_accelerator_ids()["GPU"], key=_gpu_order))
        return ray.util.get_node_ip_address(), context.get_node_id(), gpu_ids


def create_placement_groups(plan: ClusterPlan, timeout_s: float) -> Placement:
    """Reserve the plan's bundles and find out where they are; all of them or none.

    Training, inference and decoding get a group each; colocated or debugged alone there is just
    one.

    Args:
        plan: Its bundles say which groups there are.
        timeout_s: How long nodes may take to join, and other jobs to free what they use.

    Raises:
        PlacementError: The cluster can't hold the plan; at once where that is certain.
        WorkerLostError: A probe died or didn't answer.
    """
    deadline = time.monotonic() + timeout_s
    _wait_for_gpu_resources(plan, timeout_s)
    run = f"torchspec-{secrets.token_hex(4)}"
    wanted = {
        "training": plan.training_bundles,
        "inference": plan.inference_bundles,
        "decoding": plan.decoding_bundles,
    }
    with ExitStack() as undo:
        reserved: list[tuple[PlacementGroup, tuple[Bundle, ...]]] = []
        for name, bundles in wanted.items():
            if bundles:
                resources = [_resources(bundle) for bundle in bundles]
                group = placement_group(resources, strategy="PACK", name=f"{run}-{name}")
                undo.callback(remove_placement_group, group)
                reserved.append((group, bundles))
        for group, bundles in reserved:
            if not group.wait(max(deadline - time.monotonic(), MIN_RESERVE_S)):
                nodes = [node["Resources"] for node in living_nodes()]
                raise placement_error(plan, nodes, _no_room(bundles))
        slots = sort_slots(_probe(reserved))
        undo.pop_all()
    return Placement(
        training=tuple(slot for slot in slots if "training" in slot.bundle.roles),
        inference=tuple(slot for slot in slots if "inference" in slot.bundle.roles),
        groups=tuple(group for group, _ in reserved),
        decoding=tuple(slot for slot in slots if "decoding" in slot.bundle.roles),
    )


def driver_actor(actor_class: type, node_id: str | None = None, **options: Any) -> Any:
    """An actor class without a bundle; on ``node_id``, or else beside the driver."""
    node = node_id or ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(actor_class).options(num_cpus=0, scheduling_strategy=strategy, **options)


def sort_slots(slots: Sequence[Slot]) -> list[Slot]:
    """Order by node, then by GPU, both as numbers: 10.0.0.9 before 10.0.0.10, GPU 9 before 10."""
    return sorted(slots, key=_slot_order)


def _slot_order(slot: Slot) -> tuple[Any, ...]:
    address = ipaddress.ip_address(slot.node_ip)
    gpus = tuple(_gpu_order(gpu_id) for gpu_id in slot.gpu_ids)
    return address.version, int(address), gpus, slot.bundle_index


def _gpu_order(gpu_id: str) -> tuple[int, str]:
    """Orders decimal ids as numbers, and the UUIDs that some clusters use by themselves."""
    return len(gpu_id), gpu_id


def _resources(bundle: Bundle) -> dict[str, float]:
    resources = {"CPU": float(bundle.num_cpus), "GPU": float(bundle.num_gpus)}
    return {name: amount for name, amount in resources.items() if amount}


def _bundle_strategy(group: PlacementGroup, index: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)


def _no_room(bundles: Sequence[Bundle]) -> str:
    """What is missing where the cluster is large enough: others use it."""
    roles, free = " and ".join(bundles[0].roles), ray.available_resources()
    return (
        f"room for {len(bundles)} {roles} bundle(s) beside what already runs there "
        f"({free.get('GPU', 0):.0f} GPUs and {free.get('CPU', 0):.0f} CPUs are free)"
    )


def _probe(reserved: Sequence[tuple[PlacementGroup, tuple[Bundle, ...]]]) -> list[Slot]:
    places = [(group, i, bundle) for group, bundles in reserved for i, bundle in enumerate(bundles)]
    info_actor: Any = ray.remote(InfoActor)
    with ExitStack() as stack:
        answers = []
        for group, index, bundle in places:
            strategy = _bundle_strategy(group, index)
            options = {"num_cpus": 0, "num_gpus": bundle.num_gpus, "scheduling_strategy": strategy}
            actor = info_actor.options(**options).remote()
            stack.callback(ray.kill, actor)
            answers.append(actor.where.remote())
        found = get(answers, PROBE_TIMEOUT_S, "a placement probe")
    return [Slot(*place, *where) for place, where in zip(places, found, strict=True)]
