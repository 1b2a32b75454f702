"""The pipeline: from conversations to a registered draft."""

# Modules, not their tasks: `pyflyte run` offers every task in this namespace by itself.
from flytekit import conditional, workflow

from tasks import evaluate_checkpoint as evaluation_task
from tasks import prepare_data as data_task
from tasks import provision_cluster as cluster_task
from tasks import register_artifact as registry_task
from tasks import train_draft as training_task
from tasks.run_input import RunInput
from torchspec_lib.results import RegisteredDraft


@workflow
def train_draft(run: RunInput) -> RegisteredDraft:
    """Train an EAGLE-3 draft for a target model, evaluate it, and register it if it is good.

    Args:
        run: Target, conversations and settings; the files under ``configs/`` are examples.

    Returns:
        What was registered, or why nothing was, with all figures of the run.
    """
    data = data_task.prepare_data(run=run)
    provisioned = cluster_task.provision_cluster(run=run, data=data)
    draft = training_task.train_draft(run=run, data=data, provisioned=provisioned)
    evaluation, passed = evaluation_task.evaluate_checkpoint(run=run, data=data, draft=draft)
    outcome = {
        "run": run,
        "data": data,
        "provisioned": provisioned,
        "draft": draft,
        "evaluation": evaluation,
    }
    return (
        conditional("gate")
        .if_(passed.is_true())
        .then(registry_task.register_artifact(**outcome))
        .else_()
        .then(registry_task.report_rejection(**outcome))
    )
