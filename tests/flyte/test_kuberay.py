"""The Ray cluster of a training, as KubeRay gets it through Flyte."""

from pathlib import Path
from typing import Any

import pytest
from flyteidl.core import tasks_pb2
from flyteidl.plugins import ray_pb2
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from google.protobuf.json_format import MessageToDict, ParseDict

from tasks import train_draft
from tasks.ray_pods import worker_groups
from tasks.run_input import RunInput
from tests.flyte.serialized import Package
from torchspec_lib.plan import ClusterPlan, make_plan
from torchspec_lib.target import read_target

IMAGES = ImageConfig(
    default_image=Image("default", "torchspec-flyte", "cpu"),
    images=[Image("gpu", "torchspec-flyte", "gpu"), Image("default", "torchspec-flyte", "cpu")],
)
SETTINGS = SerializationSettings(project="p", domain="d", version="v", image_config=IMAGES)


def run_of(folder: Path = Path("data"), **sections: dict[str, Any]) -> RunInput:
    values: dict[str, Any] = {
        "model": {"target": "examples/tiny_target"},
        "data": {
            "train": ["examples/tiny_target/train.jsonl"],
            "heldout": ["examples/tiny_target/heldout.jsonl"],
            "max_length": 512,
        },
        "training": {"training_num_nodes": 2, "training_num_gpus_per_node": 4},
        "inference": {"inference_num_gpus": 12, "inference_num_gpus_per_node": 8},
        "data_root": str(folder),
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return RunInput.model_validate(values)


def plan_of(run: RunInput) -> ClusterPlan:
    return make_plan(run, read_target(run.model), num_prompts=1500, longest=300)


def ray_job(run: RunInput) -> ray_pb2.RayJob:
    """The job that ``run`` gets at run time; an unknown field would raise here."""
    task = train_draft.train_draft
    before = task._task_config
    task._task_config = train_draft.job_for(run, plan_of(run))
    try:
        return ParseDict(task.get_custom(SETTINGS), ray_pb2.RayJob())
    finally:
        task._task_config = before


def pod(group: Any) -> dict[str, Any]:
    return MessageToDict(group.k8s_pod.pod_spec)


def container(group: Any) -> dict[str, Any]:
    (only,) = pod(group)["containers"]
    return only


def groups(job: ray_pb2.RayJob) -> dict[str, ray_pb2.WorkerGroupSpec]:
    return {group.group_name: group for group in job.ray_cluster.worker_group_spec}


def test_groups_replicas_and_gpus_are_the_plan_s() -> None:
    by_name = groups(ray_job(run_of()))
    assert list(by_name) == ["training", "inference"]
    for name, num_pods, num_gpus in (("training", 2, 4), ("inference", 2, 6)):
        group = by_name[name]
        assert group.replicas == group.min_replicas == group.max_replicas == num_pods
        assert container(group)["resources"]["limits"]["nvidia.com/gpu"] == str(num_gpus)
        assert container(group)["resources"]["requests"] == container(group)["resources"]["limits"]
        assert group.ray_start_params["num-gpus"] == str(num_gpus)


def test_the_head_has_no_gpu_and_says_so_to_ray() -> None:
    head = ray_job(run_of()).ray_cluster.head_group_spec
    assert head.ray_start_params["num-gpus"] == "0"
    assert set(container(head)["resources"]["limits"]) == {"cpu", "memory"}
    assert "tolerations" not in pod(head)


def test_containers_have_the_names_that_flyte_merges_by() -> None:
    job = ray_job(run_of())
    head = job.ray_cluster.head_group_spec
    assert container(head)["name"] == head.k8s_pod.primary_container_name == "ray-head"
    for group in groups(job).values():
        assert container(group)["name"] == group.k8s_pod.primary_container_name == "ray-worker"


def test_shared_memory_holds_the_store_s_segment_and_ray_s() -> None:
    run = run_of(transfer={"segment_bytes": 40 << 30})
    for group in groups(ray_job(run)).values():
        (mount,) = container(group)["volumeMounts"]
        assert mount == {"name": "shm", "mountPath": "/dev/shm"}
        (volume,) = pod(group)["volumes"]
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "12Gi"}  # 40 / 4 + 2
        assert int(container(group)["resources"]["limits"]["memory"].removesuffix("Gi")) > 12


def test_workers_tolerate_what_keeps_others_off_gpu_nodes() -> None:
    for group in groups(ray_job(run_of())).values():
        (toleration,) = pod(group)["tolerations"]
        assert toleration["key"] == "nvidia.com/gpu"


def test_a_machine_s_node_selector_and_image_are_its_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import resources

    selector = {"nvidia.com/gpu.product": "NVIDIA-H200"}
    machine = resources.Machine(8, 64, node_selector=selector, image="other:gpu")
    monkeypatch.setattr(resources, "INFERENCE", machine)
    by_name = groups(ray_job(run_of()))
    assert pod(by_name["inference"])["nodeSelector"] == selector
    assert container(by_name["inference"])["image"] == "other:gpu"
    assert "nodeSelector" not in pod(by_name["training"])
    assert "image" not in container(by_name["training"])  # the task's is inherited


@pytest.mark.parametrize("protocol", ["tcp", "rdma"])
def test_rdma_is_asked_for_where_it_is_used(protocol: str) -> None:
    transfer = {"protocol": protocol, "device_name": "mlx5_0" if protocol == "rdma" else ""}
    for group in groups(ray_job(run_of(transfer=transfer))).values():
        uses_it = protocol == "rdma"
        assert ("rdma/hca" in container(group)["resources"]["limits"]) == uses_it
        assert ("securityContext" in container(group)) == uses_it


def test_a_queue_labels_every_pod() -> None:
    job = ray_job(run_of(cluster={"queue": "gpus"}))
    specs = [job.ray_cluster.head_group_spec, *job.ray_cluster.worker_group_spec]
    labels = [dict(spec.k8s_pod.metadata.labels) for spec in specs]
    assert labels == [{"kueue.x-k8s.io/queue-name": "gpus"}] * 3
    without = ray_job(run_of()).ray_cluster.head_group_spec.k8s_pod.metadata.labels
    assert not without


def test_in_colocation_there_is_one_group() -> None:
    run = run_of(
        cluster={"placement": "colocate"},
        inference={"inference_num_gpus": 8},
    )
    (group,) = groups(ray_job(run)).values()
    assert (group.group_name, group.replicas) == ("training", 2)


def test_without_gpus_the_pods_have_a_core_for_every_worker() -> None:
    run = run_of(cluster={"device": "cpu"})
    training, _ = worker_groups(run, plan_of(run))
    assert (training.num_gpus, training.num_cpus) == (0, 4)
    limits = container(groups(ray_job(run))["inference"])["resources"]["limits"]
    assert set(limits) == {"cpu", "memory"}
    assert int(limits["cpu"]) >= 6


@pytest.fixture(scope="module")
def registered(package: Package) -> tasks_pb2.TaskTemplate:
    return package.task("train_draft.train_draft")


def test_the_registered_task_is_a_plain_ray_task(registered: tasks_pb2.TaskTemplate) -> None:
    assert registered.type == "ray"
    assert set(registered.interface.inputs.variables) == {"run", "data", "provisioned"}
    job = ParseDict(MessageToDict(registered.custom), ray_pb2.RayJob())
    assert list(groups(job)) == ["training", "inference"]


def test_the_cluster_goes_with_the_job(registered: tasks_pb2.TaskTemplate) -> None:
    for job in (
        ParseDict(MessageToDict(registered.custom), ray_pb2.RayJob()),
        ray_job(run_of()),
    ):
        assert job.shutdown_after_job_finishes
        assert 0 < job.ttl_seconds_after_finished <= 300  # GPUs are held for so long
        assert not job.ray_cluster.enable_autoscaling


def test_nothing_at_the_task_itself_reaches_every_pod(registered: tasks_pb2.TaskTemplate) -> None:
    """Flyte copies it to submitter, head and workers, where a second /dev/shm would clash."""
    wanted = registered.container.resources
    names = {entry.name for entry in (*wanted.requests, *wanted.limits)}
    assert names == {tasks_pb2.Resources.CPU, tasks_pb2.Resources.MEMORY}
    assert not registered.extended_resources.HasField("gpu_accelerator")
    assert not registered.extended_resources.HasField("shared_memory")


def test_all_pods_agree_on_ray_s_authentication(registered: tasks_pb2.TaskTemplate) -> None:
    environment = {pair.key: pair.value for pair in registered.container.env}
    assert environment["RAY_AUTH_MODE"] == "disabled"
    job = ray_job(run_of())
    specs = [job.ray_cluster.head_group_spec, *job.ray_cluster.worker_group_spec]
    assert all("env" not in container(spec) for spec in specs)  # nothing overrides it
