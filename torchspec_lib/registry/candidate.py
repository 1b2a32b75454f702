"""A draft that asks to be registered, and where it comes from."""

import hashlib
import importlib.metadata
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.results import Cost, DatasetManifest, EvalReport, TrainSummary
from torchspec_lib.target import TargetSpec

MODEL_CARD = "README.md"
COMMIT = "COMMIT"
"""A file that an image keeps beside the code, which has no checkout there."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trained and evaluated draft with its lineage."""

    draft_dir: Path
    """The exported folder."""
    target: TargetSpec
    manifest: DatasetManifest
    training: TrainSummary
    report: EvalReport
    step_metrics: Path
    """JSON lines, one step each: ``StepMetrics`` with ``accept_rates`` and ``accept_length``."""
    stage_s: Mapping[str, float]
    """How long each stage of the pipeline took, in its order."""
    cost: Cost
    champion_report: EvalReport | None = None
    """The champion under ``report``'s conditions; see ``champion_evaluation``."""
    champion_content: str | None = None
    """Which draft that is, by its ``content_hash``: another may be the champion by now."""


def content_hash(draft_dir: Path) -> str:
    """SHA-256 over the names and bytes of a draft's files; its model card doesn't count."""
    digest = hashlib.sha256()
    for path in sorted(p for p in draft_dir.rglob("*") if p.is_file() and p.name != MODEL_CARD):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(draft_dir).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def config_hash(run: RunConfig) -> str:
    """Of all settings of a run, as 16 hex digits; the settings themselves lie with the version."""
    return hashlib.sha256(run.model_dump_json().encode()).hexdigest()[:16]


def code_version() -> str:
    """The commit of a checkout, ``-dirty`` with local changes; else the image's, or the version.

    The version also where git doesn't tell: it refuses another user's checkout.
    """
    noted = PROJECT_ROOT / COMMIT
    if noted.is_file():
        return noted.read_text().strip()
    git = shutil.which("git")
    if git is not None and (PROJECT_ROOT / ".git").exists():
        describe = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(describe, cwd=PROJECT_ROOT, capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    return importlib.metadata.version("torchspec-flyte")
