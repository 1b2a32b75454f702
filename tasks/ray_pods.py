"""The Ray cluster of a training as KubeRay understands it: one group of pods for each role.

Sizes come from the plan, kinds of machines from ``resources``. Everything stands in the groups'
own pods and nothing at the task, whose resources the head and the submitter would get too.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flytekit import PodTemplate

from tasks import resources
from torchspec_lib.config.run import RunConfig
from torchspec_lib.plan import Bundle, ClusterPlan

if TYPE_CHECKING:
    from kubernetes.client import V1PodSpec, V1ResourceRequirements

HEAD_CONTAINER, WORKER_CONTAINER = "ray-head", "ray-worker"
"""Flyte renames the task's container so, and merges a group's container by that name."""
GIB = 1 << 30
RAY_OBJECT_STORE_GIB = 2
"""Ray's own share of /dev/shm: only metadata travels through it."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True)
class WorkerGroup:
    """Ray nodes of one kind: as many pods, each with all of this."""

    name: str
    num_pods: int
    num_gpus: int
    num_cpus: int
    mem_gib: int
    shm_gib: int
    """Of the memory, /dev/shm: the store's segment lies there."""
    machine: resources.Machine
    with_rdma: bool = False


def worker_groups(run: RunConfig, plan: ClusterPlan) -> tuple[WorkerGroup, ...]:
    """What the plan's bundles need: pods of equal size for each role that has some."""
    roles = (
        ("training", plan.training_bundles, plan.training_num_nodes, resources.TRAINING),
        ("inference", plan.inference_bundles, plan.inference_num_nodes, resources.INFERENCE),
        ("decoding", plan.decoding_bundles, len(plan.decoding_bundles), resources.INFERENCE),
    )
    return tuple(
        _group(name, bundles, num_nodes, machine, run, plan)
        for name, bundles, num_nodes, machine in roles
        if bundles
    )


def _group(
    name: str,
    bundles: tuple[Bundle, ...],
    num_nodes: int,
    machine: resources.Machine,
    run: RunConfig,
    plan: ClusterPlan,
) -> WorkerGroup:
    per_node = math.ceil(len(bundles) / num_nodes)
    num_gpus = per_node * bundles[0].num_gpus
    num_nodes_in_all = plan.training_num_nodes + plan.inference_num_nodes
    shm_gib = math.ceil(plan.owned_bytes(num_nodes_in_all) / GIB) + RAY_OBJECT_STORE_GIB
    units = max(num_gpus, 1)
    return WorkerGroup(
        name=name,
        num_pods=num_nodes,
        num_gpus=num_gpus,
        num_cpus=max(per_node * bundles[0].num_cpus, machine.cpus_per_gpu * num_gpus),
        mem_gib=machine.mem_gib_per_gpu * units + shm_gib,
        shm_gib=shm_gib,
        machine=machine,
        with_rdma=run.transfer.protocol == "rdma",
    )


def worker_template(group: WorkerGroup, queue: str | None) -> PodTemplate:
    """The pod of a worker."""
    from kubernetes import client

    amounts = {"cpu": str(group.num_cpus), "memory": f"{group.mem_gib}Gi"}
    if group.num_gpus:
        amounts[resources.GPU_RESOURCE] = str(group.num_gpus)
    if group.with_rdma:
        amounts[resources.RDMA_RESOURCE] = "1"
    container = client.V1Container(
        name=WORKER_CONTAINER,
        image=group.machine.image,
        resources=_exactly(amounts),
        volume_mounts=[client.V1VolumeMount(name="shm", mount_path="/dev/shm")],
    )
    if group.with_rdma:  # registering memory with the network card pins it
        capabilities = client.V1Capabilities(add=["IPC_LOCK"])
        container.security_context = client.V1SecurityContext(capabilities=capabilities)
    size = f"{group.shm_gib}Gi"
    memory = client.V1EmptyDirVolumeSource(medium="Memory", size_limit=size)
    tolerations = (
        [client.V1Toleration(key=resources.GPU_RESOURCE, operator="Exists", effect="NoSchedule")]
        if group.num_gpus
        else None
    )
    return _template(
        client.V1PodSpec(
            containers=[container],
            volumes=[client.V1Volume(name="shm", empty_dir=memory)],
            node_selector=dict(group.machine.node_selector) or None,
            tolerations=tolerations,
        ),
        queue,
    )


def head_template(queue: str | None) -> PodTemplate:
    """The head's pod: the driver runs there, and nothing that needs a GPU."""
    from kubernetes import client

    cpus, mem = str(resources.HEAD_CPUS), f"{resources.HEAD_MEM_GIB}Gi"
    needed = _exactly({"cpu": cpus, "memory": mem})
    container = client.V1Container(name=HEAD_CONTAINER, resources=needed)
    return _template(client.V1PodSpec(containers=[container]), queue)


def _exactly(amounts: dict[str, str]) -> "V1ResourceRequirements":
    from kubernetes import client

    return client.V1ResourceRequirements(requests=amounts, limits=amounts)


def _template(pod_spec: "V1PodSpec", queue: str | None) -> PodTemplate:
    labels: dict[str, Any] | None = {QUEUE_LABEL: queue} if queue else None
    name = pod_spec.containers[0].name
    return PodTemplate(pod_spec=pod_spec, primary_container_name=name, labels=labels)
