"""The folder of a training run: what lies where, and whether the run is finished."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torchspec_lib.config import RunConfig
from torchspec_lib.results import TrainSummary
from torchspec_lib.types import StepMetrics


@dataclass(frozen=True, slots=True)
class RunFolder:
    """``<data_root>/runs/<run_id>``. A run is finished once its summary is there."""

    path: Path

    @classmethod
    def of(cls, run: RunConfig, run_id: str) -> "RunFolder":
        return cls(run.data_path / "runs" / run_id)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def draft(self) -> Path:
        return self.path / "draft"

    @property
    def metrics(self) -> Path:
        """One step a line, as JSON: ``StepMetrics`` with its rates and length."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def reports(self) -> Path:
        return self.path / "reports"

    def open(self, run: RunConfig) -> None:
        """Make the folder, emptied where ``fresh`` asks for it, and note the configuration."""
        if run.fresh and self.path.exists():
            shutil.rmtree(self.path)
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

    def keep_metrics_until(self, step: int) -> list[StepMetrics]:
        """Drop what was noted after ``step``, which is trained again; gives what is left."""
        kept = [metrics for metrics in self.read_metrics() if metrics.step <= step]
        self.metrics.write_text("")
        self.append_metrics(kept)
        return kept

    def append_metrics(self, steps: Sequence[StepMetrics]) -> None:
        with self.metrics.open("a") as file:
            for step in steps:
                rates = {"accept_rates": step.accept_rates, "accept_length": step.accept_length}
                file.write(json.dumps(asdict(step) | rates) + "\n")

    def read_metrics(self) -> list[StepMetrics]:
        if not self.metrics.is_file():
            return []
        rows = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        for row in rows:
            del row["accept_rates"], row["accept_length"]
            row["chains"], row["matches"] = tuple(row["chains"]), tuple(row["matches"])
        return [StepMetrics(**row) for row in rows]
