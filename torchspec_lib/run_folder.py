"""The folder of a training run: what lies where, and whether the run is finished."""

import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from torchspec_lib import json_lines
from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import ConfigError
from torchspec_lib.results import DatasetManifest, SnapshotResult, TrainSummary
from torchspec_lib.target import TargetSpec
from torchspec_lib.types import Recovery, StepMetrics

CLAIM_TIMEOUT_S = 60.0

_CHECKPOINT_FILES = ("meta.json",)
"""Holds the hash of every other file."""
_DRAFT_FILES = ("config.json", "model.safetensors")
_PUBLISHED_FILES = ("config.json", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """``<data_root>/runs/<run_id>``. A run is finished once its summary is there."""

    path: Path

    @classmethod
    def of(cls, run: RunConfig, manifest: DatasetManifest, target: TargetSpec) -> "RunFolder":
        """The folder of the run that these inputs make, and so no other."""
        contents = [manifest.dataset_id, target.fingerprint]
        if run.training.continual_from is not None:
            contents.append(continual_fingerprint(run.training.continual_path))
        return cls(run.data_path / "runs" / run.training_hash(" ".join(contents)))

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def draft(self) -> Path:
        return self.path / "draft"

    @property
    def snapshots(self) -> Path:
        """Drafts from amidst the training: those to be decoded yet, and the best."""
        return self.path / "snapshots"

    def snapshot(self, step: int) -> Path:
        return self.snapshots / f"step_{step:06d}"

    @property
    def snapshot_results(self) -> Path:
        """One decoded snapshot a line, as JSON: ``SnapshotResult``."""
        return self.path / "snapshots.jsonl"

    @property
    def metrics(self) -> Path:
        """One step a line, as JSON: ``StepMetrics`` with its rates and length."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def recoveries(self) -> Path:
        """One recovery a line, as JSON: ``Recovery``."""
        return self.path / "recoveries.jsonl"

    @property
    def reports(self) -> Path:
        return self.path / "reports"

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Be the only run in this folder, until this ends and every ``use`` of it has ended too.

        Waits for the actors of a run that was killed: they notice a little later.

        Raises:
            ConfigError: Another process trains this very run.
        """
        deadline = time.monotonic() + CLAIM_TIMEOUT_S
        with self._lock_file() as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ConfigError(
                            "data_root",
                            f"run {self.run_id} is being trained by another process",
                            "Wait for it, or use another data_root or seed",
                        ) from None
                time.sleep(0.5)
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def use(self) -> TextIO:
        """Keep other runs out for as long as the result lives: for actors that write here."""
        file = self._lock_file()
        fcntl.flock(file, fcntl.LOCK_SH)
        return file

    def _lock_file(self) -> TextIO:
        """Beside the folder, which may be emptied."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.with_suffix(".lock").open("w")

    def open(self, run: RunConfig) -> None:
        """Make the folder, where ``fresh`` says so without an older result, and note ``run``."""
        if run.fresh:
            for old in (self.checkpoints, self.draft, self.snapshots):
                if old.exists():
                    shutil.rmtree(old)
            mark = checkpoint_mark(self.checkpoints)
            notes = (self.metrics, self.snapshot_results, self.recoveries)
            for file in (*notes, self.summary, mark):
                file.unlink(missing_ok=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(run.model_dump_json(indent=2))

    def finished(self) -> TrainSummary | None:
        """The summary of a run that came to its end."""
        if not (self.summary.is_file() and self.draft.is_dir()):
            return None
        return TrainSummary.model_validate_json(self.summary.read_text())

    def finish(self, summary: TrainSummary) -> None:
        """Mark the run as finished; the last thing that happens to it."""
        new = self.summary.with_suffix(".tmp")
        new.write_text(summary.model_dump_json(indent=2))
        new.replace(self.summary)

    def keep_metrics_until(self, step: int) -> None:
        """Drop what was noted after ``step``, which is trained again."""
        rows = json_lines.read(self.metrics)
        json_lines.replace(self.metrics, (row for row in rows if row["step"] <= step))

    def append_metrics(self, steps: Sequence[StepMetrics]) -> None:
        json_lines.append(
            self.metrics,
            (
                asdict(step)
                | {"accept_rates": step.accept_rates, "accept_length": step.accept_length}
                for step in steps
            ),
        )

    def append_recovery(self, recovery: Recovery) -> None:
        json_lines.append(self.recoveries, [asdict(recovery)])

    def read_recoveries(self) -> list[Recovery]:
        return [Recovery(**row) for row in json_lines.read(self.recoveries)]

    def append_snapshot(self, result: SnapshotResult) -> None:
        json_lines.append(self.snapshot_results, [result.model_dump(mode="json")])

    def read_snapshots(self) -> list[SnapshotResult]:
        return [
            SnapshotResult.model_validate(row) for row in json_lines.read(self.snapshot_results)
        ]

    def read_metrics(self) -> list[StepMetrics]:
        rows = json_lines.read(self.metrics)
        for row in rows:
            del row["accept_rates"], row["accept_length"]
            row["chains"], row["matches"] = tuple(row["chains"]), tuple(row["matches"])
        return [StepMetrics(**row) for row in rows]


def checkpoint_mark(checkpoints: Path) -> Path:
    """The file beside a folder of checkpoints that says that there are some.

    Without it, a run whose checkpoints have vanished would start over as if it were new.
    """
    return checkpoints.with_suffix(".json")


def continual_fingerprint(path: Path) -> str:
    """Identifies the weights that ``training.continual_from`` names, as 16 hex digits.

    Args:
        path: A checkpoint of any run, an exported draft, or a published one.

    Raises:
        ConfigError: It is none of them.
    """
    for names in (_CHECKPOINT_FILES, _DRAFT_FILES, _PUBLISHED_FILES):
        if all((path / name).is_file() for name in names):
            return _fingerprint([path / name for name in names])
    raise ConfigError(
        "training.continual_from",
        f"{path} is no checkpoint ({', '.join(_CHECKPOINT_FILES)}) and no exported draft "
        f"({', '.join(_DRAFT_FILES)})",
        "Name a folder such as runs/<run id>/checkpoints/step_001000 or runs/<run id>/draft",
    )


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
