"""Task: a data set and a plan -> a trained draft. Engines and trainers work together on Ray."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flytekit import task
from flytekit.types.directory import FlyteDirectory
from flytekit.types.file import FlyteFile

from tasks.outputs import PreparedData, ProvisionedCluster, TrainedDraft
from tasks.resources import GPU_IMAGE, INFERENCE, RAY_HEAD, TINY, TRAINING
from tasks.run_input import RunInput
from tasks.stage import Stopwatch, stage
from tasks.torchspec_job import TorchSpecJob

if TYPE_CHECKING:
    from torchspec_lib.joint_cluster import JointCluster


@dataclass(frozen=True)
class TrainingCluster:
    """The cluster that is up, and the watch that ran while it came up."""

    joint: "JointCluster"
    watch: Stopwatch


@contextmanager
def bring_up(
    run: RunInput, data: PreparedData, provisioned: ProvisionedCluster
) -> Iterator[TrainingCluster]:
    """Engines and trainers, as the plan says."""
    with stage("train_draft") as watch:
        from torchspec_lib.joint_cluster import joint_cluster

        folder = Path(data.folder.download())
        with joint_cluster(run, provisioned.plan, folder, data.manifest) as joint:
            yield TrainingCluster(joint, watch)


JOB = TorchSpecJob(bring_up=bring_up, head=RAY_HEAD, training=TRAINING, inference=INFERENCE)


@task(
    task_config=JOB,
    container_image=GPU_IMAGE,
    requests=TINY,  # of the pod that submits the job; each Ray node has its own
    shared_memory=True,
    retries=3,
    enable_deck=True,
    deck_fields=(),
)
def train_draft(
    run: RunInput,
    data: PreparedData,
    provisioned: ProvisionedCluster,  # noqa: ARG001 - bring_up reads it
    cluster: TrainingCluster,
) -> TrainedDraft:
    """Train on hidden states that the engines capture meanwhile.

    A retry, or a rerun with the same inputs, goes on from the last checkpoint, and a finished
    run is not repeated, unless ``run.fresh`` asks for it.
    """
    from tasks import draft_reports, reports

    summary = cluster.joint.train()
    folder = data.run_folder(run)
    page = draft_reports.training_report(summary, folder.read_metrics())
    reports.publish("training", page, folder)
    return TrainedDraft(
        summary=summary,
        draft=FlyteDirectory(summary.draft_dir),
        metrics=FlyteFile(str(folder.metrics)),
        wall_s=cluster.watch.elapsed_s,
    )
