"""What a Flyte cluster gets of tasks and workflows: complete, and as is promised."""

import pytest
from flyteidl.core import tasks_pb2

from tests.flyte.serialized import Package

CACHED = {
    "prepare_data.prepare_data": ("2", ["run", "answers"]),
    "provision_cluster.provision_cluster": ("1", []),
    "regenerate_responses.answer_prompts": ("1", ["run"]),
    "evaluate_checkpoint.evaluate_checkpoint": ("2", ["run", "data", "draft"]),
}
"""Tasks that Flyte caches: under which version, and the inputs that its key leaves out."""
ALL_TASKS = [
    "check_run.check_run",
    "choose_prompts.choose_prompts",
    "choose_prompts.report_quiet_night",
    "evaluate_checkpoint.evaluate_checkpoint",
    "judge_draft.judge_draft",
    "launch_training.find_draft",
    "launch_training.launch_training",
    "prepare_data.prepare_data",
    "provision_cluster.provision_cluster",
    "regenerate_responses.answer_prompts",
    "regenerate_responses.regenerate_responses",
    "register_artifact.register_artifact",
    "register_artifact.report_rejection",
    "report_failure.report_failure",
    "train_draft.train_draft",
]
ON_A_GPU_IMAGE = {
    "evaluate_checkpoint.evaluate_checkpoint",
    "judge_draft.judge_draft",
    "regenerate_responses.answer_prompts",
    "train_draft.train_draft",
}
STEPS = {"launch_training.launch_training", "regenerate_responses.regenerate_responses"}
"""Dynamic steps, which only start tasks and last as long as these."""


def steps(package: Package, workflow: str) -> list[str]:
    nodes = package.workflow(workflow).template.nodes
    names = [node.task_node.reference_id.name for node in nodes]
    return [name.rpartition(".")[2] for name in names if name]


def branches(package: Package, workflow: str) -> list[str]:
    nodes = package.workflow(workflow).template.nodes
    (gate,) = [node.branch_node.if_else for node in nodes if node.HasField("branch_node")]
    ids = [
        node.task_node.reference_id
        if node.HasField("task_node")
        else node.workflow_node.sub_workflow_ref
        for node in (gate.case.then_node, gate.else_node)
    ]
    return [id.name.rpartition(".")[2] for id in ids]


def kinds(task: tasks_pb2.TaskTemplate) -> set[int]:
    wanted = task.container.resources
    return {entry.name for entry in (*wanted.requests, *wanted.limits)}


def test_the_package_holds_every_task_and_no_other(package: Package) -> None:
    # The training task itself is there twice over: registered, and within the dynamic step.
    assert package.names("1") == [f"tasks.{name}" for name in ALL_TASKS]


def test_the_pipeline_is_the_sentence_that_it_reads_as(package: Package) -> None:
    assert steps(package, "train_draft.train_draft") == [
        "check_run",
        "regenerate_responses",
        "prepare_data",
        "provision_cluster",
        "launch_training",
        "evaluate_checkpoint",
        "judge_draft",
    ]
    assert branches(package, "train_draft.train_draft") == ["register_artifact", "report_rejection"]


def test_a_night_chooses_prompts_and_then_is_the_pipeline(package: Package) -> None:
    assert steps(package, "train_nightly.train_nightly") == ["choose_prompts"]
    assert branches(package, "train_nightly.train_nightly") == ["train_draft", "report_quiet_night"]


def test_a_failure_is_reported(package: Package) -> None:
    handler = package.workflow("train_draft.train_draft").template.failure_node
    assert handler.task_node.reference_id.name == "tasks.report_failure.report_failure"


@pytest.mark.parametrize("name", ALL_TASKS)
def test_exactly_the_repeatable_stages_are_cached_under_stated_versions(
    package: Package, name: str
) -> None:
    metadata = package.task(name).metadata
    assert metadata.discoverable == (name in CACHED)
    if name in CACHED:
        ignored = list(metadata.cache_ignore_input_vars)
        assert (metadata.discovery_version, ignored) == CACHED[name]
        assert metadata.cache_serializable


@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_task_has_a_timeout_its_image_and_the_shared_volume(
    package: Package, name: str
) -> None:
    task = package.task(name)
    assert task.metadata.timeout.seconds >= 3600
    assert task.metadata.pod_template_name == "torchspec"
    image = "torchspec-flyte:gpu" if name in ON_A_GPU_IMAGE else "torchspec-flyte:cpu"
    assert task.container.image == image


@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_task_has_a_deck_but_the_step_that_only_starts_one_that_has(
    package: Package, name: str
) -> None:
    assert package.task(name).metadata.generates_deck.value == (name not in STEPS)


@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_task_of_the_pipeline_is_tried_again(package: Package, name: str) -> None:
    """But for the steps that last as long as what they start, which is tried again by itself."""
    once = {"report_failure.report_failure", *STEPS}
    assert (package.task(name).metadata.retries.retries >= 2) == (name not in once)


def test_the_dynamic_step_may_last_as_long_as_the_training_in_it(package: Package) -> None:
    step, training = (
        package.task(name).metadata.timeout.seconds
        for name in ("launch_training.launch_training", "train_draft.train_draft")
    )
    assert step >= training


@pytest.mark.parametrize("name", ALL_TASKS)
def test_only_what_loses_nothing_runs_where_it_may_be_interrupted(
    package: Package, name: str
) -> None:
    goes_on = name in {
        "train_draft.train_draft",
        "evaluate_checkpoint.evaluate_checkpoint",
        "regenerate_responses.answer_prompts",
    }
    assert package.task(name).metadata.interruptible == goes_on


@pytest.mark.parametrize("name", ALL_TASKS)
def test_a_gpu_is_asked_for_where_a_model_runs_in_the_task_s_own_pod(
    package: Package, name: str
) -> None:
    on_gpu = name in ON_A_GPU_IMAGE - {"train_draft.train_draft"}
    assert (tasks_pb2.Resources.GPU in kinds(package.task(name))) == on_gpu


def test_only_tasks_that_check_or_push_get_the_hubs_token_as_the_pod_template_has_it(
    package: Package,
) -> None:
    asking = {
        name: package.task(name).security_context.secrets
        for name in ALL_TASKS
        if package.task(name).security_context.secrets
    }
    assert sorted(asking) == [
        "check_run.check_run",
        "provision_cluster.provision_cluster",
        "register_artifact.register_artifact",
    ]
    for (secret,) in asking.values():
        assert (secret.group, secret.key, secret.env_var) == ("huggingface", "token", "HF_TOKEN")
        assert secret.mount_requirement == secret.ENV_VAR
