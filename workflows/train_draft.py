"""The pipeline: from conversations to a registered draft."""

# Modules, not their tasks: `pyflyte run` offers every task in this namespace by itself.
from flytekit import conditional, workflow

from tasks import check_run as check_task
from tasks import evaluate_checkpoint as evaluation_task
from tasks import judge_draft as judging_task
from tasks import launch_training as training_step
from tasks import prepare_data as data_task
from tasks import provision_cluster as cluster_task
from tasks import regenerate_responses as regeneration_step
from tasks import register_artifact as registry_task
from tasks import report_failure as failure_task
from tasks.run_input import RunInput
from torchspec_lib.results import RegisteredDraft


@workflow(on_failure=failure_task.report_failure)
def train_draft(run: RunInput) -> RegisteredDraft:
    """Train an EAGLE-3 draft for a target model, evaluate it, and register it if it is good.

    Args:
        run: Target, conversations and settings; the files under ``configs/`` are examples.

    Returns:
        What was registered, or why nothing was, with all figures of the run.
    """
    checked = check_task.check_run(run=run)
    answers = regeneration_step.regenerate_responses(run=run, key=checked.answers_key)
    data = data_task.prepare_data(run=run, key=checked.data_key, answers=answers)
    provisioned = cluster_task.provision_cluster(run=run, data=data)
    draft = training_step.launch_training(run=run, data=data, provisioned=provisioned)
    evaluation = evaluation_task.evaluate_checkpoint(
        run=run,
        data=data,
        draft=draft,
        draft_sha256=draft.sha256,
        key=checked.evaluation_key,
    )
    result = {
        "run": run,
        "data": data,
        "provisioned": provisioned,
        "draft": draft,
        "evaluation": evaluation,
    }
    verdict, passed = judging_task.judge_draft(**result)
    return (
        conditional("gate")
        .if_(passed.is_true())
        .then(registry_task.register_artifact(**result, verdict=verdict))
        .else_()
        .then(registry_task.report_rejection(**result, verdict=verdict))
    )
