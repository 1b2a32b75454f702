"""Task: a configuration -> what is wrong with it, or what the stages' results are known by."""

import hashlib
import json
import secrets

from flytekit import task

from tasks.outputs import CheckedRun
from tasks.resources import CPU_IMAGE, POD_TEMPLATE, RETRIES, SHORT, TINY, cluster_nodes
from tasks.run_input import RunInput
from tasks.stage import stage


@task(
    container_image=CPU_IMAGE,
    requests=TINY,
    pod_template_name=POD_TEMPLATE,
    retries=RETRIES,
    timeout=SHORT,
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

        dataset_id = Sources.open(run.data).dataset_id(run, target)
        evaluation = {
            "dataset": dataset_id,
            "target": target.fingerprint,
            "dtype": run.model.dtype,
            "device": run.cluster.device,
            "settings": run.evaluation.model_dump(mode="json"),
        }
        text = json.dumps(evaluation, sort_keys=True)
        return CheckedRun(
            data_key=f"{dataset_id} {_generation(run, dataset_id)}",
            evaluation_key=hashlib.sha256(text.encode()).hexdigest()[:16],
        )


def _generation(run: RunInput, dataset_id: str) -> str:
    """Changes when a data set was removed: Flyte's cache would lead to where it has been."""
    folder = run.data_path / "datasets" / dataset_id
    note = folder.with_suffix(".generation")
    if not (folder.is_dir() and note.is_file()):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(secrets.token_hex(8))
    return note.read_text()
