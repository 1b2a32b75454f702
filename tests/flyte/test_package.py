"""What a Flyte cluster gets: serialized offline, and a Ray cluster as KubeRay understands it."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from flyteidl.admin import launch_plan_pb2, task_pb2, workflow_pb2
from flyteidl.core import tasks_pb2
from flyteidl.plugins import ray_pb2
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message

from torchspec_lib.config.settings import PROJECT_ROOT

MESSAGES: dict[str, type[Message]] = {
    "1": task_pb2.TaskSpec,
    "2": workflow_pb2.WorkflowSpec,
    "3": launch_plan_pb2.LaunchPlan,
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Message]:
    """Every file of the package, parsed, by ``<entity>_<kind>``."""
    path = tmp_path_factory.mktemp("package") / "package.tgz"
    images = ["--image", "default=torchspec-flyte:cpu", "--image", "gpu=torchspec-flyte:gpu"]
    pyflyte = Path(sys.executable).with_name("pyflyte")
    subprocess.run(
        [pyflyte, "--pkgs", "workflows", "package", *images, "--output", str(path)],
        cwd=PROJECT_ROOT,
        capture_output=True,
        check=True,
        timeout=120,
    )
    parsed = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            entity = Path(member.name).stem.split("_", 1)[1]
            parsed[entity] = MESSAGES[entity[-1]].FromString(file.read())
    return parsed


@pytest.fixture(scope="module")
def training_task(package: dict[str, Message]) -> tasks_pb2.TaskTemplate:
    task = package["tasks.train_draft.train_draft_1"]
    assert isinstance(task, task_pb2.TaskSpec)
    return task.template


@pytest.fixture(scope="module")
def ray_job(training_task: tasks_pb2.TaskTemplate) -> ray_pb2.RayJob:
    """The task's Ray job; an unknown field would raise here."""
    return ParseDict(MessageToDict(training_task.custom), ray_pb2.RayJob())


def gpus(group: ray_pb2.HeadGroupSpec | ray_pb2.WorkerGroupSpec) -> int:
    (container,) = MessageToDict(group.k8s_pod.pod_spec)["containers"]
    return int(container["resources"]["limits"].get("nvidia.com/gpu", 0))


def test_the_package_holds_the_pipeline(package: dict[str, Message]) -> None:
    workflow = package["workflows.train_draft.train_draft_2"]
    assert isinstance(workflow, workflow_pb2.WorkflowSpec)
    names = [node.task_node.reference_id.name for node in workflow.template.nodes]
    assert [name.rpartition(".")[2] for name in names if name] == [
        "prepare_data",
        "provision_cluster",
        "train_draft",
        "evaluate_checkpoint",
    ]
    (gate,) = [n.branch_node.if_else for n in workflow.template.nodes if n.HasField("branch_node")]
    branches = [gate.case.then_node, gate.else_node]
    assert [node.task_node.reference_id.name.rpartition(".")[2] for node in branches] == [
        "register_artifact",
        "report_rejection",
    ]


def test_the_training_task_is_a_plain_ray_task(training_task: tasks_pb2.TaskTemplate) -> None:
    assert training_task.type == "ray"
    assert training_task.container.image == "torchspec-flyte:gpu"
    assert set(training_task.interface.inputs.variables) == {"run", "data", "provisioned"}
    assert training_task.metadata.retries.retries > 0


def test_the_head_has_no_gpu_and_each_role_its_group(ray_job: ray_pb2.RayJob) -> None:
    head, groups = ray_job.ray_cluster.head_group_spec, ray_job.ray_cluster.worker_group_spec
    assert head.ray_start_params["num-gpus"] == "0"
    assert gpus(head) == 0
    assert [group.group_name for group in groups] == ["training", "inference"]
    assert all(gpus(group) > 0 for group in groups)
    assert all(g.replicas == g.min_replicas == g.max_replicas > 0 for g in groups)
    assert not ray_job.ray_cluster.enable_autoscaling


def test_the_ray_cluster_goes_with_the_job_and_its_logs_stay_a_while(
    ray_job: ray_pb2.RayJob,
) -> None:
    assert ray_job.shutdown_after_job_finishes
    assert ray_job.ttl_seconds_after_finished > 0


def test_the_pod_that_submits_the_job_asks_for_no_gpu(
    training_task: tasks_pb2.TaskTemplate,
) -> None:
    kinds = {entry.name for entry in training_task.container.resources.requests}
    kinds |= {entry.name for entry in training_task.container.resources.limits}
    assert tasks_pb2.Resources.GPU not in kinds
    assert not training_task.extended_resources.HasField("gpu_accelerator")


def test_all_pods_agree_on_ray_s_authentication(training_task: tasks_pb2.TaskTemplate) -> None:
    environment = {pair.key: pair.value for pair in training_task.container.env}
    assert environment["RAY_AUTH_MODE"] == "disabled"
