"""Tasks at the end: register a draft that passed the gate, or say why nothing was registered."""

from pathlib import Path

from flytekit import task

from tasks.outputs import Evaluation, PreparedData, ProvisionedCluster, TrainedDraft, stage_times
from tasks.resources import CPU_IMAGE, TINY
from tasks.run_input import RunInput
from tasks.stage import stage
from torchspec_lib.results import RegisteredDraft


@task(container_image=CPU_IMAGE, requests=TINY, enable_deck=True, deck_fields=())
def register_artifact(
    run: RunInput,
    data: PreparedData,
    provisioned: ProvisionedCluster,
    draft: TrainedDraft,
    evaluation: Evaluation,
) -> RegisteredDraft:
    """Register the draft with its lineage; it becomes the champion if it is the best so far."""
    with stage("register_artifact"):
        return _conclude(run, data, provisioned, draft, evaluation)


@task(container_image=CPU_IMAGE, requests=TINY, enable_deck=True, deck_fields=())
def report_rejection(
    run: RunInput,
    data: PreparedData,
    provisioned: ProvisionedCluster,
    draft: TrainedDraft,
    evaluation: Evaluation,
) -> RegisteredDraft:
    """Register nothing, and say by how much the draft failed the gate."""
    with stage("report_rejection"):
        return _conclude(run, data, provisioned, draft, evaluation)


def _conclude(
    run: RunInput,
    data: PreparedData,
    provisioned: ProvisionedCluster,
    draft: TrainedDraft,
    evaluation: Evaluation,
) -> RegisteredDraft:
    """The registry checks the gate itself, so that no way around it leads into it."""
    from tasks import reports
    from torchspec_lib.registry.candidate import Candidate
    from torchspec_lib.registry.registry import register_draft

    candidate = Candidate(
        draft_dir=Path(draft.draft.download()),
        target=data.target,
        manifest=data.manifest,
        training=draft.summary,
        report=evaluation.report,
        step_metrics=Path(draft.metrics.download()),
        stage_s=stage_times(data, provisioned, draft, evaluation),
        champion_report=evaluation.champion_report,
    )
    outcome = register_draft(run, candidate)
    folder = data.run_folder(run)
    report = f"{'report':<15}{folder.reports / 'registration.html'}"
    outcome = outcome.model_copy(update={"summary": f"{outcome.summary}\n{report}"})
    reports.publish("registration", reports.registration_report(outcome, candidate), folder)
    return outcome
