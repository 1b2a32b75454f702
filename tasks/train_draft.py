"""Task: a data set and a plan -> a trained draft. Engines and trainers work together on Ray."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flytekit import current_context, task
from flytekit.types.directory import FlyteDirectory
from flytekit.types.file import FlyteFile

from tasks import resources
from tasks.outputs import PreparedData, ProvisionedCluster, TrainedDraft
from tasks.ray_pods import WorkerGroup, worker_groups
from tasks.run_input import RunInput
from tasks.stage import is_local, stage
from tasks.torchspec_job import TorchSpecJob
from torchspec_lib.cost import held_s, note_bring_up
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.registry.candidate import content_hash
from torchspec_lib.results import TrainSummary
from torchspec_lib.run_folder import RunFolder

if TYPE_CHECKING:
    from torchspec_lib.joint_cluster import JointCluster

BEGUN = "execution.txt"
"""In a run's folder: the Flyte execution that began, or went on with, its training last."""


@contextmanager
def bring_up(
    run: RunInput, data: PreparedData, provisioned: ProvisionedCluster
) -> "Iterator[JointCluster]":
    """Engines and trainers, as the plan says.

    ``run.fresh`` is meant for an execution as a whole: its second try goes on from the
    checkpoints of its first.
    """
    with stage("train_draft") as watch:
        from torchspec_lib.joint_cluster import joint_cluster

        dataset, folder = data.shared_folder(run), data.run_folder(run)
        execution, begun = execution_name(), folder.path / BEGUN
        if execution is not None and begun.is_file() and begun.read_text() == execution:
            run = run.model_copy(update={"fresh": False})
        with joint_cluster(run, provisioned.plan, dataset, data.manifest) as joint:
            if execution is not None:
                begun.write_text(execution)
            note_bring_up(folder, watch.elapsed_s, is_first=run.fresh)
            yield joint


def execution_name() -> str | None:
    """Of Flyte's execution, which all tries of the task have in common; None in a local run."""
    execution = None if is_local() else current_context().execution_id
    return execution.name if execution is not None else None


def job_for(run: RunInput, plan: ClusterPlan) -> TorchSpecJob:
    """The Ray cluster that a plan needs."""
    groups = worker_groups(run, plan)
    return TorchSpecJob(bring_up=bring_up, groups=groups, queue=run.cluster.queue)


def _default_job() -> TorchSpecJob:
    """What is registered; ``launch_training`` puts the plan's in its place."""
    roles = (("training", resources.TRAINING), ("inference", resources.INFERENCE))
    groups = [WorkerGroup(name, 1, 1, 8, 64, 16, machine) for name, machine in roles]
    return TorchSpecJob(bring_up=bring_up, groups=tuple(groups))


@task(
    task_config=_default_job(),
    container_image=resources.GPU_IMAGE,
    requests=resources.TINY,  # of the pod that submits the job; each Ray node has its own
    pod_template_name=resources.POD_TEMPLATE,
    retries=resources.TRAINING_RETRIES,
    timeout=resources.TRAINING_TIMEOUT,
    interruptible=True,  # it goes on from its last checkpoint
    enable_deck=True,
    deck_fields=(),
)
def train_draft(
    run: RunInput,
    data: PreparedData,
    provisioned: ProvisionedCluster,  # noqa: ARG001 - bring_up reads it
    cluster: Any,  # the JointCluster that bring_up yields; no input of Flyte's
) -> TrainedDraft:
    """Train on hidden states that the engines capture meanwhile.

    A retry, or a rerun with the same inputs, goes on from the last checkpoint, and a finished
    run is not repeated, unless ``run.fresh`` asks for it.
    """
    from tasks import draft_reports, reports

    summary: TrainSummary = cluster.train()
    folder = data.run_folder(run)
    page = draft_reports.training_report(summary, folder.read_metrics())
    reports.publish("training", page, folder)
    return trained_draft(summary, folder)


def trained_draft(summary: TrainSummary, folder: RunFolder) -> TrainedDraft:
    """A finished run's output."""
    return TrainedDraft(
        summary=summary,
        draft=FlyteDirectory(str(folder.draft)),
        sha256=content_hash(Path(folder.draft)),
        metrics=FlyteFile(str(folder.metrics)),
        wall_s=held_s(folder, summary),
    )
