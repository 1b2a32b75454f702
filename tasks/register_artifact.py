"""Tasks at the end: register a draft that passed the gate, or say why nothing was registered."""

from flytekit import task

from tasks.judge_draft import candidate_of
from tasks.outputs import Evaluation, PreparedData, ProvisionedCluster, TrainedDraft, Verdict
from tasks.resources import CPU_IMAGE, HUB_TOKEN, POD_TEMPLATE, RETRIES, SHORT, TINY
from tasks.run_input import RunInput
from tasks.stage import is_local, stage
from torchspec_lib.results import RegisteredDraft


@task(
    container_image=CPU_IMAGE,
    requests=TINY,
    pod_template_name=POD_TEMPLATE,
    secret_requests=[HUB_TOKEN],
    retries=RETRIES,
    timeout=SHORT,
    enable_deck=True,
    deck_fields=(),
)
def register_artifact(
    run: RunInput,
    data: PreparedData,
    provisioned: ProvisionedCluster,
    draft: TrainedDraft,
    evaluation: Evaluation,
    verdict: Verdict,
) -> RegisteredDraft:
    """Register the draft with its lineage; it becomes the champion if it is the best so far.

    The same content registered again is the version that it was.
    """
    with stage("register_artifact"):
        return _conclude(run, data, provisioned, draft, evaluation, verdict)


@task(
    container_image=CPU_IMAGE,
    requests=TINY,
    pod_template_name=POD_TEMPLATE,
    retries=RETRIES,
    timeout=SHORT,
    enable_deck=True,
    deck_fields=(),
)
def report_rejection(
    run: RunInput,
    data: PreparedData,
    provisioned: ProvisionedCluster,
    draft: TrainedDraft,
    evaluation: Evaluation,
    verdict: Verdict,
) -> RegisteredDraft:
    """Register nothing, and say by how much the draft failed the gate."""
    with stage("report_rejection"):
        return _conclude(run, data, provisioned, draft, evaluation, verdict)


def _conclude(
    run: RunInput,
    data: PreparedData,
    provisioned: ProvisionedCluster,
    draft: TrainedDraft,
    evaluation: Evaluation,
    verdict: Verdict,
) -> RegisteredDraft:
    """The registry checks the gate itself, so that no way around it leads into it."""
    from tasks import reports
    from torchspec_lib.registry.registry import register_draft

    candidate = candidate_of(data, provisioned, draft, evaluation, verdict)
    outcome = register_draft(run, candidate)
    folder = data.run_folder(run)
    if is_local():
        report = f"{'report':<15}{folder.reports / 'registration.html'}"
        outcome = outcome.model_copy(update={"summary": f"{outcome.summary}\n{report}"})
    page = reports.registration_report(outcome, candidate, run)
    reports.publish("registration", page, folder)
    return outcome
