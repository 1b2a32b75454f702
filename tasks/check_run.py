"""Task: a configuration -> what is wrong with it, or what the stages' results are known by."""

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flytekit import Deck, task

from tasks.outputs import CheckedRun
from tasks.report_page import facts, note, page, section
from tasks.resources import CPU_IMAGE, HUB_TOKEN, POD_TEMPLATE, RETRIES, SHORT, TINY, cluster_nodes
from tasks.run_input import RunInput
from tasks.stage import is_local, stage
from torchspec_lib.errors import ConfigError
from torchspec_lib.target import TargetSpec


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
def check_run(run: RunInput) -> CheckedRun:
    """Refuse what can't work, within seconds; identify data and evaluation by their content.

    Never cached: files change, and machines come and go.
    """
    with stage("check_run"):
        from torchspec_lib import pipeline

        # Before anything is imported that takes seconds: a mistake is told at once.
        target = pipeline.preflight(run, cluster_nodes())

        from torchspec_lib.data.sources import Sources
        from torchspec_lib.evaluation.prompt_sets import check_sets, set_digests

        _check_evaluation_pod(run)
        check_sets(run)
        sources = Sources.open(run.data)
        dataset_id = sources.dataset_id(run, target)
        dataset = run.data_path / "datasets" / dataset_id
        answers = None if dataset.is_dir() else sources.answers(run, target)
        by_sglang = run.evaluation.engine == "sglang"
        evaluation = {
            "dataset": dataset_id,
            "target": target.fingerprint,
            "dtype": run.model.dtype,
            "device": run.cluster.device,
            "settings": run.evaluation.model_dump(mode="json", exclude={"sets"}),
            "sets": set_digests(run),
            "sglang": run.inference.sglang.model_dump(mode="json") if by_sglang else None,
            "asked": run.data.chat_template_kwargs,
            "seed": run.seed if run.evaluation.temperature else None,  # greedy draws nothing
        }
        Deck("run", checked_report(run, target, dataset_id))
        text = json.dumps(evaluation, sort_keys=True)
        return CheckedRun(
            # Two targets may share a tokenizer, and so their data, but not what is told of them.
            data_key=f"{dataset_id} {_generation(dataset)} {target.fingerprint} {target.path}",
            answers_key="" if answers is None else f"{answers.path} {_generation(answers.path)}",
            evaluation_key=hashlib.sha256(text.encode()).hexdigest()[:16],
        )


def _check_evaluation_pod(run: RunInput) -> None:
    num_gpus = run.inference.sglang.tp_size or 1
    if run.evaluation.engine == "sglang" and num_gpus > 1 and not is_local():
        raise ConfigError(
            "evaluation.engine",
            f"'sglang' would run on {num_gpus} GPUs (inference.sglang.tp_size), and the pod of an "
            "evaluation has one",
            "Set it to hf, or lower inference.sglang.tp_size",
        )


def checked_report(run: RunInput, target: TargetSpec, dataset_id: str) -> str:
    """What is about to be done: the target, the data set, and what was set for it."""
    chosen = run.model_dump(mode="json", exclude_defaults=True)
    inputs = {"target": f"{target.path} ({target.fingerprint})", "data set": dataset_id}
    return page(
        "Checked run",
        "everything in it was found, and fits together",
        facts(inputs),
        section("Settings", facts(dict(_settings(chosen))), note("Everything else is the default")),
    )


def _settings(values: Mapping[str, Any], parents: str = "") -> Iterator[tuple[str, str]]:
    """Each setting's path and value."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{parents}{name}.")
        else:
            yield f"{parents}{name}", value if isinstance(value, str) else json.dumps(value)


def _generation(folder: Path) -> str:
    """Changes when a folder was removed: Flyte's cache would lead to where it has been."""
    note = folder.with_suffix(".generation")
    if not (folder.is_dir() and note.is_file()):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(secrets.token_hex(8))
    return note.read_text()
