"""The dynamic step: what it asks Flyte for at run time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flyteidl.plugins import ray_pb2
from flytekit import FlyteContextManager
from flytekit.core.context_manager import ExecutionState
from flytekit.types.directory import FlyteDirectory
from google.protobuf.json_format import ParseDict

from tasks import launch_training, train_draft
from tasks.outputs import PreparedData, ProvisionedCluster
from tasks.run_input import RunInput
from tests.flyte.records import ESTIMATE, MANIFEST, SUMMARY
from tests.flyte.test_kuberay import SETTINGS, container, groups, plan_of, run_of
from torchspec_lib.target import read_target


@contextmanager
def on_a_cluster() -> Iterator[Any]:
    context = FlyteContextManager.current_context()
    state = context.execution_state
    assert state is not None
    remote = state.with_params(mode=ExecutionState.Mode.TASK_EXECUTION)
    builder = context.with_serialization_settings(SETTINGS).with_execution_state(remote)
    with FlyteContextManager.with_context(builder) as inner:
        yield inner


def launched(run: RunInput, tmp_path: Path) -> Any:
    """What the dynamic step asks Flyte for."""
    target = read_target(run.model)
    (tmp_path / "folder").mkdir(exist_ok=True)
    data = PreparedData(
        target=target,
        manifest=MANIFEST,
        folder=FlyteDirectory(str(tmp_path / "folder")),
        wall_s=1.0,
    )
    provisioned = ProvisionedCluster(plan=plan_of(run), estimate=ESTIMATE, wall_s=0.1)
    step = launch_training.launch_training
    step._wf = None  # compiled once a process, which is once a pod
    with on_a_cluster() as context:
        return step.compile_into_workflow(
            context, step._task_function, run=run, data=data, provisioned=provisioned
        )


def test_the_dynamic_step_sizes_the_cluster_by_the_plan(tmp_path: Path) -> None:
    before = train_draft.train_draft._task_config
    try:
        spec = launched(run_of(tmp_path), tmp_path)
    finally:
        train_draft.train_draft._task_config = before
    (template,) = spec.tasks
    assert template.type == "ray"
    job = ParseDict(template.custom, ray_pb2.RayJob())
    sizes = {
        name: (group.replicas, container(group)["resources"]["limits"]["nvidia.com/gpu"])
        for name, group in groups(job).items()
    }
    assert sizes == {"training": (2, "4"), "inference": (2, "6")}


def test_for_a_finished_run_the_dynamic_step_asks_for_no_node(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    data = PreparedData(
        target=read_target(run.model),
        manifest=MANIFEST,
        folder=FlyteDirectory(str(tmp_path)),
        wall_s=1.0,
    )
    folder = data.run_folder(run)
    folder.draft.mkdir(parents=True)
    folder.finish(SUMMARY)
    (template,) = launched(run, tmp_path).tasks
    assert template.id.name == "tasks.launch_training.find_draft"
    assert template.type == "python-task"
    fresh = run.model_copy(update={"fresh": True})
    before = train_draft.train_draft._task_config
    try:
        (template,) = launched(fresh, tmp_path).tasks
    finally:
        train_draft.train_draft._task_config = before
    assert template.type == "ray"
