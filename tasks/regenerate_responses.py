"""Dynamic step and task: conversations -> the same with the target's own answers, where wanted."""

from flytekit import Cache, Deck, Resources, dynamic, task

from tasks.resources import (
    CPU_IMAGE,
    GPU_IMAGE,
    INFERENCE,
    POD_TEMPLATE,
    REGENERATION_TIMEOUT,
    RETRIES,
    TINY,
)
from tasks.run_input import RunInput
from tasks.stage import is_local, stage, tell

CACHE_VERSION = "1"
"""Raise it when the same key shall give other answers; see ``data.regenerated.VERSION`` too."""


def answering(num_gpus: int) -> Resources:
    """What engines on so many GPUs of one node are given."""
    return Resources(
        cpu=str(INFERENCE.cpus_per_gpu * max(num_gpus, 1)),
        mem=f"{INFERENCE.mem_gib_per_gpu * max(num_gpus, 1)}Gi",
        **({"gpu": str(num_gpus)} if num_gpus else {}),
    )


@task(
    container_image=GPU_IMAGE,
    requests=answering(1),
    pod_template_name=POD_TEMPLATE,
    cache=Cache(version=CACHE_VERSION, ignored_inputs=("run",), serialize=True),
    retries=RETRIES,
    timeout=REGENERATION_TIMEOUT,
    interruptible=True,
    enable_deck=True,
    deck_fields=(),
)
def answer_prompts(run: RunInput, key: str) -> str:  # noqa: ARG001 - the cache's key
    """Have the target answer the training conversations, or go on where that was interrupted.

    Args:
        run: What to answer, and how.
        key: ``CheckedRun.answers_key``.

    Returns:
        The id of the answers, which lie under ``data_root``.
    """
    with stage("regenerate_responses"):
        from tasks.regeneration_report import regeneration_report
        from tasks.report_page import document
        from torchspec_lib.regeneration.regenerate import regenerate
        from torchspec_lib.target import read_target

        answers, folder = regenerate(run, read_target(run.model))
        page = regeneration_report(answers, folder)
        Deck("regeneration", page)
        if is_local():
            (folder.path / "report.html").write_text(document("regeneration", page))
        tell(
            f"{answers.num_answered:,} of {answers.num_conversations:,} conversations answered: "
            f"{folder.path / 'report.html' if is_local() else folder.path}"
        )
        return answers.regeneration_id


@dynamic(
    container_image=CPU_IMAGE,
    requests=TINY,
    pod_template_name=POD_TEMPLATE,
    timeout=REGENERATION_TIMEOUT,  # it lasts as long as what it starts, which has its own retries
)
def regenerate_responses(run: RunInput, key: str) -> str:
    """Ask for a node with as many GPUs as its engines have; for none where nothing is to be done.

    Args:
        run: What to answer, and how.
        key: ``CheckedRun.answers_key``.

    Returns:
        The id of the answers, or nothing.
    """
    if not key:
        return ""
    settings, on_gpus = run.inference, run.cluster.device == "cuda"
    num_gpus = min(settings.inference_num_gpus, settings.inference_num_gpus_per_node)
    answers = answer_prompts(run=run, key=key)
    node = answering(num_gpus if on_gpus else 0)
    return answers.with_overrides(requests=node, limits=node)
