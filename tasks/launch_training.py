"""Dynamic step: a plan -> the training task with a Ray cluster of the plan's size."""

from flytekit import dynamic, task

from tasks import train_draft as training
from tasks.outputs import PreparedData, ProvisionedCluster, TrainedDraft
from tasks.resources import CPU_IMAGE, POD_TEMPLATE, RETRIES, SHORT, TINY, TRAINING_TIMEOUT
from tasks.run_input import RunInput
from tasks.stage import stage, tell


@task(
    container_image=CPU_IMAGE,
    requests=TINY,
    pod_template_name=POD_TEMPLATE,
    retries=RETRIES,
    timeout=SHORT,
    enable_deck=True,
    deck_fields=(),
)
def find_draft(run: RunInput, data: PreparedData) -> TrainedDraft:
    """The draft of a run that is finished: no node is asked for."""
    with stage("find_draft"):
        from tasks import draft_reports, reports

        folder = data.run_folder(run)
        summary = folder.finished()
        assert summary is not None, "launch_training has seen it"
        page = draft_reports.training_report(summary, folder.read_metrics())
        reports.publish("training", page, folder)
        tell(f"run {folder.run_id} is trained already (fresh: true trains it again)")
        return training.trained_draft(summary, folder)


@dynamic(
    container_image=CPU_IMAGE,
    requests=TINY,
    pod_template_name=POD_TEMPLATE,
    timeout=TRAINING_TIMEOUT,  # it lasts as long as what it starts, which has its own retries
)
def launch_training(
    run: RunInput, data: PreparedData, provisioned: ProvisionedCluster
) -> TrainedDraft:
    """Ask KubeRay for as many nodes as the plan has, or for none where the run is finished.

    Locally the overriding does nothing: the training brings up the plan that it is given.
    """
    if not run.fresh and data.run_folder(run).finished() is not None:
        return find_draft(run=run, data=data)
    draft = training.train_draft(run=run, data=data, provisioned=provisioned)
    return draft.with_overrides(task_config=training.job_for(run, provisioned.plan))
