"""Launch plans as the cluster gets them: bound, scheduled, and who is told."""

from pathlib import Path

import pytest
from flyteidl.admin import launch_plan_pb2
from flyteidl.core import execution_pb2
from flytekit.core.type_engine import TypeEngine
from flytekit.models.literals import Literal
from pydantic import ValidationError

from tasks.run_input import RunInput
from tests.flyte.serialized import Package
from torchspec_lib.config.settings import PROJECT_ROOT

SETTINGS_FILE = PROJECT_ROOT / "workflows" / "launch_plans.yaml"
OWN = [
    "train_draft",
    "train_draft_nightly",
    "train_draft_single_node",
    "train_draft_three_nodes",
]


def run_in(message: object) -> RunInput:
    from flytekit import FlyteContextManager

    context = FlyteContextManager.current_context()
    literal = Literal.from_flyte_idl(message)
    run = TypeEngine.to_python_value(context, literal, RunInput)
    assert isinstance(run, RunInput)
    return run


def test_the_launch_plans_have_stable_names(package: Package) -> None:
    assert set(OWN) <= set(package.names("3"))


def test_the_default_plan_takes_the_run_as_an_input(package: Package) -> None:
    spec = package.launch_plan("train_draft").spec
    assert spec.workflow_id.name == "workflows.train_draft.train_draft"
    assert spec.default_inputs.parameters["run"].required


def test_nights_come_by_the_clock_and_all_their_inputs_are_bound(package: Package) -> None:
    spec = package.launch_plan("train_draft_nightly").spec
    assert spec.workflow_id.name == "workflows.train_nightly.train_nightly"
    schedule = spec.entity_metadata.schedule
    assert schedule.cron_schedule.schedule == "0 2 * * *"
    bound = set(spec.fixed_inputs.literals) | {schedule.kickoff_time_input_arg}
    inputs = package.workflow("train_nightly.train_nightly").template.interface.inputs.variables
    assert bound == set(inputs) == {"run", "kickoff"}
    assert run_in(spec.fixed_inputs.literals["run"]).data.train == ("/data/inbox",)


def test_a_night_is_left_out_where_the_one_before_still_lasts(package: Package) -> None:
    policy = package.launch_plan("train_draft_nightly").spec.concurrency_policy
    assert policy.max == 1
    assert policy.behavior == launch_plan_pb2.CONCURRENCY_LIMIT_BEHAVIOR_SKIP


@pytest.mark.parametrize("name", [name for name in OWN if name != "train_draft_nightly"])
def test_no_other_plan_is_scheduled(package: Package, name: str) -> None:
    metadata = package.launch_plan(name).spec.entity_metadata
    assert not metadata.schedule.ListFields()


@pytest.mark.parametrize(
    ("name", "num_nodes", "num_gpus"),
    [("train_draft_single_node", 1, 8), ("train_draft_three_nodes", 3, 24)],
)
def test_a_profile_fills_the_machines_that_it_is_named_after(
    package: Package, name: str, num_nodes: int, num_gpus: int
) -> None:
    parameter = package.launch_plan(name).spec.default_inputs.parameters["run"]
    run = run_in(parameter.default)
    training, inference = run.training, run.inference
    assert training.world_size + inference.inference_num_gpus == num_gpus
    assert num_gpus <= 8 * num_nodes


def test_nobody_is_told_unless_somebody_is_named(package: Package) -> None:
    assert not package.launch_plan("train_draft_nightly").spec.entity_metadata.notifications


def test_every_kind_of_recipient_is_told_of_the_ends_that_were_asked_for() -> None:
    from workflows.launch_plans import Notify

    notify = Notify(
        when=("FAILED", "SUCCEEDED"),
        emails=("a@x.org",),
        slack=("b@x.org",),
        pagerduty=("c@x.org",),
    )
    idl = [notification.to_flyte_idl() for notification in notify.notifications]
    told = [
        [*n.email.recipients_email, *n.slack.recipients_email, *n.pager_duty.recipients_email]
        for n in idl
    ]
    assert told == [["a@x.org"], ["b@x.org"], ["c@x.org"]]
    phases = execution_pb2.WorkflowExecution
    assert all(list(n.phases) == [phases.FAILED, phases.SUCCEEDED] for n in idl)


def test_an_unknown_setting_of_the_launch_plans_is_refused(tmp_path: Path) -> None:
    from workflows.launch_plans import LaunchSettings

    assert LaunchSettings.load(SETTINGS_FILE).nightly.schedule == "0 2 * * *"
    file = tmp_path / "plans.yaml"
    file.write_text(SETTINGS_FILE.read_text().replace("emails:", "mails:"))
    with pytest.raises(ValidationError, match="mails"):
        LaunchSettings.load(file)


def test_a_queue_is_the_execution_s_label_which_the_ray_job_gets() -> None:
    from workflows.launch_plans import queue_labels, read_run

    run = read_run("configs/single_node.yaml")
    assert queue_labels(run) is None
    queued = run.model_copy(update={"cluster": run.cluster.model_copy(update={"queue": "gpus"})})
    labels = queue_labels(queued)
    assert labels is not None
    assert labels.values == {"kueue.x-k8s.io/queue-name": "gpus"}
