"""The only place that speaks MLflow: an experiment for the curves, a registered model for drafts.

Figures that decide about a draft are tags of its version, set when the version is created.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torchspec_lib.config.run import RunConfig
from torchspec_lib.registry.candidate import MODEL_CARD, Candidate, code_version, config_hash
from torchspec_lib.registry.gate import conditions
from torchspec_lib.registry.model_card import model_card
from torchspec_lib.results import EvalReport

ALIAS = "champion"
EVALUATION = "evaluation.json"
PROMPTS_UNTIL = "prompts_until"
DRAFT_FOLDER = "draft"
"""Where the exported draft lies among the artifacts."""
MAX_METRICS, MAX_PARAMS = 1000, 100
"""What MLflow takes in one request."""
STEP_FIGURES = ("loss", "accept_length", "learning_rate", "grad_norm", "step_s", "wait_s")


@dataclass(frozen=True, slots=True)
class DraftVersion:
    """A registered draft, and what its accept length was measured with."""

    version: str
    content: str
    accept_length: float
    conditions: str
    target_fingerprint: str
    source: str
    """URI of the draft's files."""
    run_id: str
    """MLflow's run with everything about it."""
    prompts_until: datetime | None
    """Up to when its conversations had arrived, if a night trained it."""


class MlflowStore:
    """One registered model and its experiment, both named ``model_name``."""

    def __init__(self, tracking_uri: str, model_name: str, artifacts: Path | None) -> None:
        """``artifacts``: where new experiments keep files; the server decides if None."""
        self.tracking_uri = tracking_uri
        self._name, self._artifacts = model_name, artifacts
        self._client = _client(tracking_uri)

    def champion(self) -> DraftVersion | None:
        """The version that bears the alias."""
        models = self._client.search_registered_models(f"name = '{self._name}'")
        if not models or ALIAS not in models[0].aliases:
            return None
        found = self._client.get_model_version(self._name, str(models[0].aliases[ALIAS]))
        tags = found.tags
        until = tags.get(PROMPTS_UNTIL)
        return DraftVersion(
            version=str(found.version),
            content=tags["draft_sha256"],
            accept_length=float(tags["accept_length"]),
            conditions=tags["conditions"],
            target_fingerprint=tags["target_fingerprint"],
            source=found.source,
            run_id=found.run_id,
            prompts_until=datetime.fromisoformat(until) if until else None,
        )

    def find(self, content: str) -> str | None:
        """The version with this content, by its hash."""
        query = f"name = '{self._name}' and tag.draft_sha256 = '{content}'"
        versions = self._client.search_model_versions(query)
        return str(versions[0].version) if versions else None

    def add(self, run: RunConfig, candidate: Candidate, content: str) -> str:
        """Log everything about a draft in a run of its own, then create its version."""
        client, code = self._client, code_version()
        tags = {"draft_sha256": content, **_lineage(run, candidate, code)}
        tags |= _figures(run, candidate)
        mlflow_run = client.create_run(
            self._experiment_id(), run_name=candidate.training.run_id, tags=tags
        )
        run_id, status = mlflow_run.info.run_id, "FAILED"
        try:
            client.log_artifacts(run_id, str(candidate.draft_dir), DRAFT_FOLDER)
            self._log_card(run_id, run, candidate)
            client.log_text(run_id, run.model_dump_json(indent=2), "config.json")
            client.log_text(run_id, candidate.report.model_dump_json(indent=2), EVALUATION)
            self._log_curves(run_id, candidate)
            self._log_settings(run_id, run)
            status = "FINISHED"
        finally:
            client.set_terminated(run_id, status)
        if not client.search_registered_models(f"name = '{self._name}'"):
            client.create_registered_model(self._name)
        source = f"{mlflow_run.info.artifact_uri}/{DRAFT_FOLDER}"
        created = client.create_model_version(self._name, source, run_id, tags=tags)
        return str(created.version)

    def update(self, version: str, run: RunConfig, candidate: Candidate) -> None:
        """Put the newest evaluation on a version, and a later night's date."""
        found = self._client.get_model_version(self._name, version)
        tags = {**_figures(run, candidate), **_night(run)}
        if all(found.tags.get(key) == value for key, value in tags.items()):
            return
        report = candidate.report.model_dump_json(indent=2)
        self._client.log_text(found.run_id, report, EVALUATION)
        self._log_card(found.run_id, run, candidate)
        for key, value in tags.items():
            self._client.set_model_version_tag(self._name, version, key, value)

    def evaluation(self, draft: DraftVersion) -> EvalReport:
        """A version's newest evaluation, prompt by prompt."""
        with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
            file = Path(self._client.download_artifacts(draft.run_id, EVALUATION, folder))
            return EvalReport.model_validate_json(file.read_text())

    def make_champion(self, version: str) -> None:
        """Move the alias."""
        self._client.set_registered_model_alias(self._name, ALIAS, version)

    def download(self, draft: DraftVersion, folder: Path) -> Path:
        """Copy a version's files under ``folder``; gives the draft's own folder."""
        from mlflow.artifacts import download_artifacts

        folder.mkdir(parents=True, exist_ok=True)
        return Path(
            download_artifacts(
                artifact_uri=draft.source, dst_path=str(folder), tracking_uri=self.tracking_uri
            )
        )

    def _experiment_id(self) -> str:
        experiment = self._client.get_experiment_by_name(self._name)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None if self._artifacts is None else self._artifacts.as_uri()
        return str(self._client.create_experiment(self._name, artifact_location=location))

    def _log_card(self, run_id: str, run: RunConfig, candidate: Candidate) -> None:
        card = model_card(run, candidate, code_version(), datetime.now(UTC).date())
        self._client.log_text(run_id, card, f"{DRAFT_FOLDER}/{MODEL_CARD}")

    def _log_curves(self, run_id: str, candidate: Candidate) -> None:
        from mlflow.entities import Metric

        created_ms = self._client.get_run(run_id).info.start_time
        lines = candidate.step_metrics.read_text().splitlines()
        rows = [(row["step"], _step_figures(row)) for row in map(json.loads, lines)]
        rows.append((candidate.training.num_steps, _eval_figures(candidate)))
        metrics = [
            Metric(name, value, created_ms, step)
            for step, figures in rows
            for name, value in figures.items()
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])

    def _log_settings(self, run_id: str, run: RunConfig) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in _flat(run.model_dump(mode="json"))]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + MAX_PARAMS])


def _client(tracking_uri: str) -> Any:
    """A client that keeps its chatter, its progress bars and its telemetry to itself."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _lineage(run: RunConfig, candidate: Candidate, code: str) -> dict[str, str]:
    cost = candidate.cost
    return {
        "target": candidate.target.path,
        "target_fingerprint": candidate.target.fingerprint,
        "dataset_id": candidate.manifest.dataset_id,
        "training_run_id": candidate.training.run_id,
        "code_version": code,
        "config_sha256": config_hash(run),
        "gpu_hours": f"{cost.gpu_hours:.4f}",
        "gpus": str(cost.num_gpus),
        "tokens": str(cost.num_tokens),
        "wall_s": f"{cost.wall_s:.1f}",
        **_night(run),
    }


def _night(run: RunConfig) -> dict[str, str]:
    until = run.registry.prompts_until
    return {} if until is None else {PROMPTS_UNTIL: until.isoformat()}


def _figures(run: RunConfig, candidate: Candidate) -> dict[str, str]:
    """What is told of a draft. The hash changes with whatever else its model card says."""
    report = candidate.report
    told = f"{report.model_dump_json()}\n{run.registry.push_to_hub}"
    return {
        "evaluation_sha256": hashlib.sha256(told.encode()).hexdigest(),
        "accept_length": repr(report.accept_length),
        "conditions": conditions(report),
        "lossless": f"{report.num_lossless} of {report.num_prompts}",
    }


def _step_figures(row: Mapping[str, Any]) -> dict[str, float]:
    rates = {f"accept_rate_{k}": rate for k, rate in enumerate(row["accept_rates"])}
    return {name: row[name] for name in STEP_FIGURES} | rates


def _eval_figures(candidate: Candidate) -> dict[str, float]:
    report = candidate.report
    rates = {f"eval/accept_rate_{k}": rate for k, rate in enumerate(report.accept_rates)}
    projected = report.projected_speedup
    return {
        "eval/accept_length": report.accept_length,
        "eval/measured_speedup": report.measured_speedup,
        **({} if projected is None else {"eval/projected_speedup": projected}),
        **rates,
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting with its full path, as a text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
