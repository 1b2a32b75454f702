"""Images, machines and limits: what a Flyte cluster gives each task. Local runs ignore all of it.

The images are names, resolved when a workflow is registered: ``images`` in
``flyte.config.yaml``, or ``--image gpu=...`` of ``pyflyte package``. How many Ray nodes a
training gets, and with how many GPUs, is its plan's to say (``ray_pods.worker_groups``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from flytekit import Resources, Secret

from tasks.stage import is_local

CPU_IMAGE = "{{.image.default.fqn}}:{{.image.default.version}}"
GPU_IMAGE = "{{.image.gpu.fqn}}:{{.image.gpu.version}}"
POD_TEMPLATE = "torchspec"
"""A PodTemplate in the cluster, which mounts what all pods share: ``data_root``'s volume."""

TINY = Resources(cpu="1", mem="2Gi")
"""Tasks that only compute a plan or talk to the registry; and the pod that submits a Ray job."""
DATA_PREPARATION = Resources(cpu="4", mem="16Gi")
EVALUATION = Resources(cpu="8", mem="64Gi", gpu="1")

HUB_TOKEN = Secret(
    group="huggingface",
    key="token",
    mount_requirement=Secret.MountType.ENV_VAR,
    env_var="HF_TOKEN",
)
"""For ``registry.push_to_hub``; Flyte leaves it out where there is no such secret. Local runs take
``HF_TOKEN`` from the shell."""

SHORT = timedelta(hours=1)
"""Tasks that should take a minute; a node for their pod may have to be found first."""
PREPARATION_TIMEOUT = timedelta(hours=12)
EVALUATION_TIMEOUT = timedelta(hours=6)
TRAINING_TIMEOUT = REGENERATION_TIMEOUT = timedelta(days=7)
"""Waiting for the GPUs counts."""
RETRIES = 2
"""Of tasks that are cheap to repeat."""
TRAINING_RETRIES = 3


@dataclass(frozen=True)
class Machine:
    """The kind of node that a role's workers run on, and what a worker gets for each GPU."""

    cpus_per_gpu: int
    mem_gib_per_gpu: int
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Such as ``{"nvidia.com/gpu.product": "NVIDIA-H200"}``."""
    image: str | None = None
    """The task's, if left out."""


TRAINING = Machine(cpus_per_gpu=8, mem_gib_per_gpu=64)
INFERENCE = Machine(cpus_per_gpu=8, mem_gib_per_gpu=96)
HEAD_CPUS, HEAD_MEM_GIB = 4, 16
"""The driver, the controller and the store's master; no GPU."""
GPU_RESOURCE, RDMA_RESOURCE = "nvidia.com/gpu", "rdma/hca"
"""The second is asked for where ``transfer.protocol`` is ``rdma``; the device plugin names it."""

QUOTA_NODES, QUOTA_GPUS_PER_NODE, QUOTA_CPUS_PER_NODE = 8, 8, 128
"""The largest cluster that a training may ask for."""


def cluster_nodes() -> list[dict[str, float]] | None:
    """The most that KubeRay may bring up for a training; None in a local run."""
    if is_local():
        return None
    node = {"GPU": float(QUOTA_GPUS_PER_NODE), "CPU": float(QUOTA_CPUS_PER_NODE)}
    return [node] * QUOTA_NODES
