"""Images and machine sizes: what a Flyte cluster gives each task. Local runs ignore all of it.

The images are names, resolved when a workflow is registered: ``images`` in
``flyte.config.yaml``, or ``--image gpu=...`` of ``pyflyte package``.
"""

from dataclasses import dataclass

from flytekit import Resources

from tasks.stage import is_local

CPU_IMAGE = "{{.image.default.fqn}}:{{.image.default.version}}"
GPU_IMAGE = "{{.image.gpu.fqn}}:{{.image.gpu.version}}"

TINY = Resources(cpu="1", mem="2Gi")
"""Tasks that only compute a plan or talk to the registry; and the pod that submits a Ray job."""
DATA_PREPARATION = Resources(cpu="4", mem="16Gi")
EVALUATION = Resources(cpu="8", mem="64Gi", gpu="1")


@dataclass(frozen=True)
class WorkerGroup:
    """Nodes of one kind in the Ray cluster of a training task."""

    name: str
    num_nodes: int
    gpus_per_node: int
    cpu: str
    mem: str


RAY_HEAD = Resources(cpu="4", mem="16Gi")
"""The driver, the controller and the store's master; no GPU."""
TRAINING = WorkerGroup("training", num_nodes=1, gpus_per_node=4, cpu="32", mem="256Gi")
INFERENCE = WorkerGroup("inference", num_nodes=1, gpus_per_node=4, cpu="32", mem="512Gi")
"""Its memory holds the store's segments too."""


def cluster_nodes() -> list[dict[str, float]] | None:
    """The nodes that KubeRay will bring up for the training task; None in a local run."""
    if is_local():
        return None
    return [
        {"GPU": float(group.gpus_per_node), "CPU": float(group.cpu)}
        for group in (TRAINING, INFERENCE)
        for _ in range(group.num_nodes)
    ]
