"""Task: a draft -> its accept length, by real speculative decoding."""

from pathlib import Path

from flytekit import Cache, task

from tasks.outputs import Evaluation, PreparedData, TrainedDraft
from tasks.resources import EVALUATION, EVALUATION_TIMEOUT, GPU_IMAGE, POD_TEMPLATE, RETRIES
from tasks.run_input import RunInput
from tasks.stage import stage

CACHE_VERSION = "2"
"""Raise it when the same draft would be measured differently."""


@task(
    container_image=GPU_IMAGE,
    requests=EVALUATION,
    pod_template_name=POD_TEMPLATE,
    cache=Cache(version=CACHE_VERSION, ignored_inputs=("run", "data", "draft"), serialize=True),
    retries=RETRIES,
    timeout=EVALUATION_TIMEOUT,
    interruptible=True,
    enable_deck=True,
    deck_fields=(),
)
def evaluate_checkpoint(
    run: RunInput,
    data: PreparedData,
    draft: TrainedDraft,
    draft_sha256: str,  # noqa: ARG001 - a part of the cache's key, as is the next
    key: str,  # noqa: ARG001
) -> Evaluation:
    """Decode the held-out prompts and the named sets with the draft and without.

    Args:
        run: What to measure with.
        data: The held-out prompts. The sets are read from where ``run`` says.
        draft: The draft. These three have paths and times in them, which Flyte's cache ignores.
        draft_sha256: The draft's content.
        key: ``CheckedRun.evaluation_key``, everything else that the figures depend on.
    """
    with stage("evaluate_checkpoint") as watch:
        from tasks import reports
        from tasks.evaluation_report import evaluation_report
        from torchspec_lib.data.chat import ChatTokenizer
        from torchspec_lib.evaluation.evaluate import evaluate_draft

        draft_dir, dataset_dir = Path(draft.draft.download()), data.shared_folder(run)
        report = evaluate_draft(run, data.target, draft_dir, dataset_dir)
        remote = run.model.trust_remote_code
        tokenizer = ChatTokenizer.load(data.target.path, remote).tokenizer
        page = evaluation_report(report, None, tokenizer)
        reports.publish("evaluation", page, data.run_folder(run))
        return Evaluation(report=report, wall_s=watch.elapsed_s)
