"""Task: a draft and its evaluation -> whether it is registered, beside the champion's figures."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flytekit import task

from tasks.outputs import (
    Evaluation,
    PreparedData,
    ProvisionedCluster,
    TrainedDraft,
    Verdict,
    stage_times,
)
from tasks.resources import EVALUATION, EVALUATION_TIMEOUT, GPU_IMAGE, POD_TEMPLATE, RETRIES
from tasks.run_input import RunInput
from tasks.stage import stage, tell
from torchspec_lib.results import EvalReport

if TYPE_CHECKING:
    from torchspec_lib.registry.candidate import Candidate
    from torchspec_lib.registry.mlflow_store import DraftVersion


class Judged(NamedTuple):
    """The verdict, and whether it is good: a primitive, which Flyte can branch on."""

    verdict: Verdict
    passed: bool


@task(
    container_image=GPU_IMAGE,
    requests=EVALUATION,
    pod_template_name=POD_TEMPLATE,
    retries=RETRIES,
    timeout=EVALUATION_TIMEOUT,
    enable_deck=True,
    deck_fields=(),
)
def judge_draft(
    run: RunInput,
    data: PreparedData,
    provisioned: ProvisionedCluster,
    draft: TrainedDraft,
    evaluation: Evaluation,
) -> Judged:
    """Compare the draft with the champion as it is now, and check the gate.

    Never cached: the champion changes. It is measured anew where its figures stem from other
    conditions.
    """
    with stage("judge_draft"):
        from torchspec_lib.registry.registry import judge, other_champion

        report = evaluation.report
        best = other_champion(run, data.target, Path(draft.draft.download()))
        champion = None if best is None else _champion_report(run, data, best, report)
        content = None if best is None else best.content
        verdict = Verdict(reason="", champion_report=champion, champion_content=content)
        gate = judge(run, candidate_of(data, provisioned, draft, evaluation, verdict))
        tell(gate.reason)
        _publish(run, data, report, champion)
        return Judged(verdict.model_copy(update={"reason": gate.reason}), gate.passed)


def candidate_of(
    data: PreparedData,
    provisioned: ProvisionedCluster,
    draft: TrainedDraft,
    evaluation: Evaluation,
    verdict: Verdict,
) -> "Candidate":
    """All that the registry wants to know of a draft."""
    from torchspec_lib.cost import bill
    from torchspec_lib.registry.candidate import Candidate

    stage_s = stage_times(data, provisioned, draft, evaluation)
    return Candidate(
        draft_dir=Path(draft.draft.download()),
        target=data.target,
        manifest=data.manifest,
        training=draft.summary,
        report=evaluation.report,
        step_metrics=Path(draft.metrics.download()),
        stage_s=stage_s,
        cost=bill(provisioned.plan, draft.summary, stage_s),
        champion_report=verdict.champion_report,
        champion_content=verdict.champion_content,
    )


def _publish(
    run: RunInput, data: PreparedData, report: EvalReport, champion: EvalReport | None
) -> None:
    """Beside this run, too, where the evaluation itself was found in Flyte's cache."""
    from tasks import reports
    from tasks.evaluation_report import evaluation_report
    from torchspec_lib.data.chat import ChatTokenizer

    remote = run.model.trust_remote_code
    tokenizer = ChatTokenizer.load(data.target.path, remote).tokenizer
    page = evaluation_report(report, champion, tokenizer)
    reports.publish("evaluation", page, data.run_folder(run))


def _champion_report(
    run: RunInput, data: PreparedData, best: "DraftVersion", report: EvalReport
) -> EvalReport:
    """The champion's evaluation under the draft's conditions, from the registry or made here."""
    from torchspec_lib.registry.registry import champion_evaluation, champion_files

    known = champion_evaluation(run, best, report)
    if known is not None:
        return known
    from torchspec_lib.evaluation.evaluate import evaluate_draft

    tell("measuring the champion too: its figures stem from other conditions")
    draft_dir = champion_files(run, best)
    return evaluate_draft(run, data.target, draft_dir, data.shared_folder(run))
