"""Task: a draft -> its accept length, by real speculative decoding."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from flytekit import task

from tasks.outputs import Evaluation, PreparedData, TrainedDraft
from tasks.resources import EVALUATION, GPU_IMAGE
from tasks.run_input import RunInput
from tasks.stage import stage


class Evaluated(NamedTuple):
    """The evaluation, and whether it passes the gate: a primitive, which Flyte can branch on."""

    evaluation: Evaluation
    passed: bool


@task(container_image=GPU_IMAGE, requests=EVALUATION, enable_deck=True, deck_fields=())
def evaluate_checkpoint(run: RunInput, data: PreparedData, draft: TrainedDraft) -> Evaluated:
    """Decode the held-out prompts with the draft and without, and check the gate.

    The registry's champion is measured too where its figure stems from other conditions.
    """
    with stage("evaluate_checkpoint") as watch:
        from tasks import draft_reports, reports
        from torchspec_lib.data.chat import ChatTokenizer
        from torchspec_lib.evaluation.evaluate import evaluate_draft
        from torchspec_lib.registry.gate import check_draft
        from torchspec_lib.registry.registry import champion_to_evaluate

        target = data.target
        draft_dir, dataset_dir = Path(draft.draft.download()), Path(data.folder.download())
        report = evaluate_draft(run, target, draft_dir, dataset_dir)
        with tempfile.TemporaryDirectory(prefix="champion-") as folder:
            champion = champion_to_evaluate(run, target, draft_dir, report, Path(folder))
            champion_report = (
                None if champion is None else evaluate_draft(run, target, champion, dataset_dir)
            )
        tokenizer = ChatTokenizer.load(target.path, run.model.trust_remote_code).tokenizer
        page = draft_reports.evaluation_report(report, tokenizer)
        reports.publish("evaluation", page, data.run_folder(run))
        evaluation = Evaluation(
            report=report, champion_report=champion_report, wall_s=watch.elapsed_s
        )
        return Evaluated(evaluation, check_draft(report, run.registry.min_accept_length).passed)
