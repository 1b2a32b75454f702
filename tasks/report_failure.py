"""Task: what a failed execution leaves behind is told, and what it left half-made is removed."""

import shutil
import time
from pathlib import Path

from flytekit import Deck, task
from flytekit.types.error.error import FlyteError

from tasks.failure_page import failure_report
from tasks.resources import CPU_IMAGE, POD_TEMPLATE, SHORT, TINY
from tasks.run_input import RunInput
from tasks.stage import is_local, stage, tell

ABANDONED_S = 3600.0
"""A folder under construction that nobody has touched for so long."""


@task(
    container_image=CPU_IMAGE,
    requests=TINY,
    pod_template_name=POD_TEMPLATE,
    timeout=SHORT,
    enable_deck=True,
    deck_fields=(),
)
def report_failure(run: RunInput, err: FlyteError | None = None) -> None:
    """Say where it failed and what a relaunch goes on from; remove half-made folders.

    Nodes, engines and the store are gone already: they live as long as the training task. A
    run's folder is locked by the processes that use it, and by nobody after them.

    Args:
        run: The failed execution's.
        err: What Flyte knows of the failure.
    """
    with stage("report_failure"):
        if err is not None and not is_local():  # a terminal shows it anyway
            tell(f"failed at node {err.failed_node_id}: {err.message}")
        removed, unfinished = abandoned(run.data_path), unfinished_runs(run.data_path)
        for folder in removed:
            shutil.rmtree(folder)
            tell(f"removed {folder}, which was never finished")
        for line in unfinished:
            tell(line)
        node, message = (err.failed_node_id, err.message) if err is not None else ("unknown", "")
        Deck("failure", failure_report(node, message, unfinished, list(map(str, removed))))


def abandoned(data_root: Path) -> list[Path]:
    """Folders under construction (their names begin with a dot) that nobody works on."""
    before = time.time() - ABANDONED_S
    places = [data_root / name for name in ("datasets", "champions")]
    hidden = [path for place in places for path in place.glob(".*") if path.is_dir()]
    return [path for path in hidden if _last_written(path) < before]


def unfinished_runs(data_root: Path) -> list[str]:
    """One line for every run that a relaunch goes on with."""
    return [
        f"run {path.parent.name} is unfinished: a relaunch with the same inputs goes on from its "
        "last checkpoint"
        for path in sorted(data_root.glob("runs/*/config.json"))
        if not path.with_name("summary.json").is_file()
        and any(path.parent.glob("checkpoints/step_*"))
    ]


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
