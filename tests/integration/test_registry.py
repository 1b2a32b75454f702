"""The registry on MLflow's own SQLite store."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.candidates import make_candidate, make_report
from torchspec_lib.config.models import DataConfig, ModelConfig
from torchspec_lib.config.outcome import RegistryConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.errors import ConfigError, RegistryError
from torchspec_lib.registry.candidate import config_hash, content_hash
from torchspec_lib.registry.registry import (
    champion,
    champion_evaluation,
    champion_files,
    other_champion,
    register_draft,
    tracking_uri,
)
from torchspec_lib.results import SetResult

ONLY_BETTER = {"only_better": True}
NUM_STEPS = 130  # times ten figures: more than MLflow takes at once


FIRST_REGISTRATION = """
import logging, sys
from pathlib import Path
from tests.integration.test_registry import make_run, trained
from torchspec_lib.registry.registry import champion_files, other_champion, register_draft

logging.basicConfig(level=logging.INFO)
root = Path(sys.argv[1])
run, first, other = make_run(root), trained(root / "1", b"1"), trained(root / "2", b"2")
register_draft(run, first)
assert champion_files(run, other_champion(run, other.target, other.draft_dir))
from mlflow.telemetry.utils import is_telemetry_disabled
print("telemetry disabled:", is_telemetry_disabled())
"""


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data with spaces")


@pytest.fixture(scope="module", autouse=True)
def first_words(data_root):
    """What a process that makes the database writes to its terminal; makes it for all tests."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PYTEST"))}
    command = [sys.executable, "-c", FIRST_REGISTRATION, str(data_root)]
    done = subprocess.run(
        command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr + done.stdout


@pytest.fixture
def run(data_root, request):
    """A run whose registered model is the test's own; making the database takes seconds."""
    name = request.node.name
    return make_run(data_root, model_name=name, min_accept_length=2.0)


def make_run(data_root, **registry):
    return RunConfig(
        model=ModelConfig(target="examples/tiny_target"),
        data=DataConfig(train=("train.jsonl",), heldout=("heldout.jsonl",)),
        data_root=str(data_root),
        registry=RegistryConfig(**registry),
    )


def trained(folder, weights, **changes):
    """A candidate with files; ``weights`` are its content."""
    draft_dir = folder / "draft"
    draft_dir.mkdir(parents=True, exist_ok=True)
    (draft_dir / "config.json").write_text("{}")
    (draft_dir / "model.safetensors").write_bytes(weights)
    rows = [
        {
            "step": step,
            "loss": 5.0 / step,
            "learning_rate": 1e-3,
            "grad_norm": 0.5,
            "accept_length": 2.0,
            "accept_rates": [0.6, 0.5, 0.4, 0.3],
            "step_s": 0.2,
            "wait_s": 0.01,
        }
        for step in range(1, NUM_STEPS + 1)
    ]
    metrics = folder / "metrics.jsonl"
    metrics.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return make_candidate(draft_dir, step_metrics=metrics, **changes)


def client(run):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(run), tracking_uri(run))


def versions(run):
    return client(run).search_model_versions(f"name = '{run.registry.model_name}'")


def test_a_registered_draft_has_its_files_figures_lineage_and_curves(run, tmp_path, data_root):
    candidate = trained(tmp_path, b"weights")
    outcome = register_draft(run, candidate)

    assert (outcome.registered, outcome.version, outcome.is_new) == (True, "1", True)
    assert outcome.is_champion
    assert outcome.summary.startswith("registered ")
    assert "register " in outcome.summary
    [version] = versions(run)
    assert version.tags["dataset_id"] == "d4e5"
    assert version.tags["target_fingerprint"] == candidate.target.fingerprint
    assert version.tags["accept_length"] == "3.5"
    assert version.tags["code_version"]
    run_id = version.run_id
    curve = client(run).get_metric_history(run_id, "loss")
    assert [m.value for m in sorted(curve, key=lambda m: m.step)] == [
        5.0 / step for step in range(1, NUM_STEPS + 1)
    ]
    found = client(run).get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["accept_rate_3"] == 0.3
    assert found.data.metrics["eval/accept_length"] == 3.5
    assert found.data.params["training.learning_rate"] == "0.0001"
    files = {file.path for file in client(run).list_artifacts(run_id, "draft")}
    assert files == {"draft/config.json", "draft/model.safetensors", "draft/README.md"}
    assert {file.path for file in client(run).list_artifacts(run_id)} >= {
        "config.json",
        "evaluation.json",
    }
    assert list((data_root / "registry" / "artifacts").rglob("model.safetensors"))
    assert not (candidate.draft_dir / "README.md").exists()


def test_the_same_content_registered_again_is_one_version_with_the_newest_figures(run, tmp_path):
    first = register_draft(run, trained(tmp_path / "a", b"weights"))
    longer = make_report(accept_length=3.6)
    second = register_draft(run, trained(tmp_path / "b", b"weights", report=longer))
    assert (second.version, second.is_new, second.is_champion) == (first.version, False, True)
    assert "champion already" in second.decision
    assert "already registered" in second.summary
    assert len(versions(run)) == 1
    best = champion(run, trained(tmp_path / "a", b"weights").target)
    assert best.accept_length == 3.6
    card = client(run).download_artifacts(best.run_id, "draft/README.md", str(tmp_path))
    assert "| 3.60 |" in Path(card).read_text()


def test_the_alias_moves_only_to_a_better_draft(run, tmp_path):
    lengths = {b"first": 3.0, b"worse": 2.5, b"equal": 3.0, b"better": 3.1}
    outcomes = [
        register_draft(
            run, trained(tmp_path / str(length), name, report=make_report(accept_length=length))
        )
        for name, length in lengths.items()
    ]
    assert [o.version for o in outcomes] == ["1", "2", "3", "4"]
    assert [o.is_champion for o in outcomes] == [True, False, False, True]
    assert "0.500 less" in outcomes[1].decision
    best = champion(run, make_candidate(tmp_path).target)
    assert (best.version, best.accept_length) == ("4", 3.1)


@pytest.mark.parametrize("change", [{"num_lossless": 99}, {"accept_length": 1.5}])
def test_a_failed_gate_registers_nothing(tmp_path, change):
    run = make_run(tmp_path / "root", min_accept_length=2.0)
    outcome = register_draft(run, trained(tmp_path, b"weights", report=make_report(**change)))
    assert not outcome.registered
    assert outcome.version == ""
    assert "differ" in outcome.decision or "0.500 below" in outcome.decision
    assert outcome.summary.startswith("not registered")
    assert not (tmp_path / "root").exists()


def test_without_a_registry_there_is_no_champion_and_none_is_made(tmp_path):
    run = make_run(tmp_path / "root")
    assert champion(run, make_candidate(tmp_path).target) is None
    assert not (tmp_path / "root").exists()


def test_a_champion_measured_otherwise_is_evaluated_anew_before_it_is_compared(run, tmp_path):
    register_draft(run, trained(tmp_path / "old", b"old", report=make_report(accept_length=3.4)))
    report = make_report(max_new_tokens=64, accept_length=3.5)
    new = trained(tmp_path / "new", b"new", report=report)
    with pytest.raises(ValueError, match="evaluate the champion's draft"):
        register_draft(run, new)

    best = other_champion(run, new.target, new.draft_dir)
    assert champion_evaluation(run, best, report) is None
    assert (champion_files(run, best) / "model.safetensors").read_bytes() == b"old"
    anew = make_report(max_new_tokens=64, accept_length=3.7)
    compared = {"champion_report": anew, "champion_content": best.content}
    outcome = register_draft(run, replace(new, **compared))
    assert not outcome.is_champion
    assert "3.700" in outcome.decision

    # Measured beside the old one, while a better one came.
    register_draft(run, trained(tmp_path / "3", b"3", report=make_report(accept_length=4.5)))
    with pytest.raises(RegistryError, match="became the champion while"):
        register_draft(run, replace(new, **compared))


def test_a_draft_is_compared_with_the_champion_as_it_is_now(run, tmp_path):
    first = trained(tmp_path / "1", b"1", report=make_report(accept_length=4.0))
    register_draft(run, first)
    register_draft(run, trained(tmp_path / "2", b"2", report=make_report(accept_length=5.0)))
    late = trained(tmp_path / "3", b"3", report=make_report(accept_length=4.5))
    content = content_hash(first.draft_dir)
    late = replace(late, champion_report=first.report, champion_content=content)
    outcome = register_draft(run, late)
    assert not outcome.is_champion
    assert "5.000" in outcome.decision
    assert champion(run, late.target).version == "2"


def test_a_champion_measured_alike_brings_its_evaluation_along(run, tmp_path):
    old = trained(tmp_path / "old", b"old")
    assert other_champion(run, old.target, old.draft_dir) is None
    register_draft(run, old)
    assert other_champion(run, old.target, old.draft_dir) is None
    new = trained(tmp_path / "new", b"new")
    best = other_champion(run, new.target, new.draft_dir)
    assert champion_evaluation(run, best, new.report) == old.report
    assert champion_evaluation(run, best, make_report(draft_steps=3)) is None


def test_what_is_evaluated_anew_reaches_the_version_and_its_card(run, tmp_path):
    candidate = trained(tmp_path, b"carded")
    register_draft(run, candidate)
    fields = candidate.report.model_dump(include=set(SetResult.model_fields))
    more = SetResult.model_validate(fields | {"name": "mt_bench", "category": "math"})
    again = candidate.report.model_copy(update={"sets": (more,)})
    assert not register_draft(run, replace(candidate, report=again)).is_new
    best = champion(run, candidate.target)
    assert champion_evaluation(run, best, again) == again
    card = champion_files(run, best).joinpath("README.md").read_text()
    assert "mt_bench: math" in card


def test_drafts_beside_a_database_lie_under_the_data_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    database = f"sqlite:///{tmp_path}/other.db"
    run = make_run(tmp_path / "root", tracking_uri=database)
    register_draft(run, trained(tmp_path / "draft", b"weights"))
    assert list((tmp_path / "root/registry/artifacts").rglob("model.safetensors"))
    assert not (tmp_path / "mlruns").exists()


def test_with_only_better_a_draft_that_does_not_beat_the_champion_is_not_registered(run, tmp_path):
    strict = run.model_copy(update={"registry": run.registry.model_copy(update=ONLY_BETTER)})
    first = trained(tmp_path / "1", b"1")
    assert register_draft(strict, first).registered
    worse = trained(tmp_path / "2", b"2", report=make_report(accept_length=3.4))
    outcome = register_draft(strict, worse)
    assert not outcome.registered
    assert "doesn't beat the champion's 3.500" in outcome.decision
    assert len(versions(run)) == 1
    better = trained(tmp_path / "3", b"3", report=make_report(accept_length=3.6))
    assert register_draft(strict, better).is_champion
    assert register_draft(strict, better).registered  # a relaunch finds itself


def test_a_version_says_what_the_draft_has_cost_and_where_its_prompts_end(run, tmp_path):
    night = {"prompts_until": datetime(2026, 11, 23, 2, tzinfo=UTC)}
    run = run.model_copy(update={"registry": run.registry.model_copy(update=night)})
    candidate = trained(tmp_path, b"weights")
    register_draft(run, candidate)
    [version] = versions(run)
    assert float(version.tags["gpu_hours"]) == candidate.cost.gpu_hours
    assert version.tags["tokens"] == "120000"
    assert version.tags["config_sha256"] == config_hash(run)
    best = champion(run, candidate.target)
    assert best is not None
    assert best.prompts_until == night["prompts_until"]
    files = champion_files(run, best)
    assert (files / "model.safetensors").read_bytes() == b"weights"
    assert champion_files(run, best) == files
    assert not list(files.parent.glob(".*"))


def test_a_champion_of_another_target_is_an_error_that_says_what_to_change(run, tmp_path):
    register_draft(run, trained(tmp_path / "old", b"old"))
    new = trained(tmp_path / "new", b"new")
    other = new.target.model_copy(update={"fingerprint": "0" * 16})
    with pytest.raises(ConfigError, match="for another target") as caught:
        champion(run, other)
    assert caught.value.key == "registry.model_name"


def test_an_alias_that_was_lost_in_a_crash_is_set_by_the_rerun(run, tmp_path):
    candidate = trained(tmp_path, b"weights")
    register_draft(run, candidate)
    client(run).delete_registered_model_alias(run.registry.model_name, "champion")
    outcome = register_draft(run, candidate)
    assert (outcome.version, outcome.is_new, outcome.is_champion) == ("1", False, True)
    assert champion(run, candidate.target).version == "1"


def test_a_registration_that_fails_half_way_leaves_no_version(run, tmp_path):
    candidate = trained(tmp_path, b"weights")
    candidate.step_metrics.unlink()
    with pytest.raises(FileNotFoundError):
        register_draft(run, candidate)
    assert versions(run) == []
    experiment = client(run).get_experiment_by_name(run.registry.model_name)
    [found] = client(run).search_runs([experiment.experiment_id])
    assert found.info.status == "FAILED"


def test_mlflow_keeps_quiet_and_sends_no_telemetry(first_words):
    lines = first_words.splitlines()
    assert lines[-1] == "telemetry disabled: True"
    assert [line for line in lines if not line.startswith("INFO:torchspec_lib")] == lines[-1:]
