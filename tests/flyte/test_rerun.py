"""What a rerun does: nothing where nothing changed, and what has to be done where something did.

The pipeline itself, but for the training, which a finished run's folder stands in for.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flytekit.core import local_cache

from tasks.check_run import check_run
from tasks.judge_draft import judge_draft
from tasks.launch_training import find_draft
from tasks.outputs import Evaluation, PreparedData, TrainedDraft
from tasks.prepare_data import prepare_data
from tasks.provision_cluster import provision_cluster
from tasks.register_artifact import register_artifact
from tasks.report_failure import ABANDONED_S, report_failure
from tasks.run_input import RunInput
from tasks.stage import PlainError
from tests.candidates import make_report
from tests.flyte.records import SUMMARY
from torchspec_lib.config.settings import PROJECT_ROOT
from workflows.train_draft import train_draft

TINY = PROJECT_ROOT / "examples" / "tiny_target"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(local_cache, "CACHE_LOCATION", str(tmp_path / "cache"))
    monkeypatch.setattr(local_cache.LocalTaskCache, "_initialized", False)
    yield
    monkeypatch.undo()
    local_cache.LocalTaskCache._initialized = False


@pytest.fixture
def run(tmp_path: Path) -> RunInput:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join((TINY / "train.jsonl").read_text().splitlines()[:20]) + "\n")
    values = {
        "model": {"target": str(TINY), "dtype": "float32"},
        "data": {
            "train": [str(prompts)],
            "heldout": [str(TINY / "heldout.jsonl")],
            "max_length": 512,
        },
        "cluster": {"device": "cpu"},
        "evaluation": {"max_prompts": 2, "max_new_tokens": 4, "draft_steps": 2},
        "data_root": str(tmp_path / "data"),
    }
    return RunInput.model_validate(values)


def prepared(run: RunInput) -> PreparedData:
    return prepare_data(run=run, key=check_run(run=run).data_key)


def did(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The tasks that ran."""
    titles = ("check_run", "prepare_data", "provision_cluster", "find_draft", "judge_draft")
    return [line for line in capsys.readouterr().err.splitlines() if line in titles]


def test_unchanged_conversations_are_not_prepared_again(
    run: RunInput, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepared(run)
    provision_cluster(run=run, data=first)
    assert did(capsys) == ["check_run", "prepare_data", "provision_cluster"]
    again = prepared(run)
    provision_cluster(run=run, data=again)
    assert did(capsys) == ["check_run"]
    assert again.manifest == first.manifest


def test_another_target_with_the_same_tokenizer_is_not_taken_for_the_first(
    run: RunInput, tmp_path: Path
) -> None:
    first = prepared(run)
    other = shutil.copytree(TINY, tmp_path / "other")
    with (other / "model.safetensors").open("r+b") as weights:
        weights.seek(-4, os.SEEK_END)
        weights.write(b"tune")
    tuned = run.model_copy(update={"model": run.model.model_copy(update={"target": str(other)})})
    second = prepared(tuned)
    assert second.manifest.dataset_id == first.manifest.dataset_id
    assert second.target.path == str(other)
    assert second.target.fingerprint != first.target.fingerprint
    assert second.run_folder(tuned) != first.run_folder(run)


def test_a_run_on_data_that_were_prepared_for_another_shows_them_too(run: RunInput) -> None:
    first = prepared(run)
    other = run.model_copy(update={"seed": 7})
    data = prepared(other)
    assert data.run_folder(other) != first.run_folder(run)
    provision_cluster(run=other, data=data)
    shown = (first.run_folder(run).reports / "data.html").read_text()
    again = (data.run_folder(other).reports / "data.html").read_text()
    assert again.partition("</nav>")[2] == shown.partition("</nav>")[2] != ""


def test_a_changed_file_under_the_same_path_is_prepared_again(
    run: RunInput, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepared(run)
    more = "\n".join((TINY / "train.jsonl").read_text().splitlines()[:25]) + "\n"
    Path(run.data.train[0]).write_text(more)
    second = prepared(run)
    provision_cluster(run=run, data=second)
    assert did(capsys).count("prepare_data") == 2
    assert second.manifest.num_prompts == first.manifest.num_prompts + 5


def test_the_same_file_under_another_path_is_not_prepared_again(
    run: RunInput, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(run)
    moved = Path(run.data.train[0]).rename(Path(run.data.train[0]).with_name("moved.jsonl"))
    data = run.data.model_copy(update={"train": (str(moved),)})
    prepared(run.model_copy(update={"data": data}))
    assert did(capsys).count("prepare_data") == 1


def test_prepared_data_that_was_removed_is_prepared_again(
    run: RunInput, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepared(run)
    shutil.rmtree(first.folder.path)
    assert (Path(prepared(run).folder.path) / "manifest.json").is_file()
    assert did(capsys).count("prepare_data") == 2
    prepared(run)
    assert did(capsys) == ["check_run"]


def test_every_setting_of_the_evaluation_is_part_of_its_key(run: RunInput) -> None:
    key = check_run(run=run).evaluation_key
    assert check_run(run=run.model_copy(update={"seed": 7})).evaluation_key == key
    changed = run.evaluation.model_copy(update={"max_new_tokens": 5})
    other = run.model_copy(update={"evaluation": changed})
    assert check_run(run=other).evaluation_key != key


def test_what_a_named_set_of_prompts_holds_is_part_of_the_evaluations_key(
    run: RunInput, tmp_path: Path
) -> None:
    def key(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text)
        changed = run.evaluation.model_copy(update={"sets": {"mt_bench": str(path)}})
        return check_run(run=run.model_copy(update={"evaluation": changed})).evaluation_key

    first = key("a.jsonl", '{"prompt": "One?"}\n')
    assert key("b.jsonl", '{"prompt": "One?"}\n') == first
    assert key("a.jsonl", '{"prompt": "Two?"}\n') != first
    assert check_run(run=run).evaluation_key != first


def finished(run: RunInput, data: PreparedData) -> TrainedDraft:
    folder = data.run_folder(run)
    folder.draft.mkdir(parents=True)
    (folder.draft / "config.json").write_text("{}")
    (folder.draft / "model.safetensors").write_bytes(b"weights")
    row = {"step": 1, "loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "step_s": 1.0}
    row |= {"wait_s": 0.1, "chains": [4, 2], "matches": [2, 1], "num_samples": 2}
    row |= {"num_tokens": 9, "num_loss_tokens": 8, "accept_length": 1.5, "accept_rates": [0.5, 0.5]}
    folder.metrics.write_text(json.dumps(row) + "\n")
    folder.finish(SUMMARY)
    draft = find_draft(run=run, data=data)
    assert isinstance(draft, TrainedDraft)
    return draft


def test_registering_twice_gives_one_version(run: RunInput) -> None:
    data = prepared(run)
    provisioned = provision_cluster(run=run, data=data)
    draft = finished(run, data)
    result = {
        "run": run,
        "data": data,
        "provisioned": provisioned,
        "draft": draft,
        "evaluation": Evaluation(report=make_report(), wall_s=1.0),
    }
    outcomes = []
    for _ in range(2):
        verdict, passed = judge_draft(**result)
        assert passed
        outcomes.append(register_artifact(**result, verdict=verdict))
    first, second = outcomes
    assert (first.version, first.is_new) == ("1", True)
    assert (second.version, second.is_new) == ("1", False)
    assert second.is_champion
    assert "already registered" in second.summary


def test_after_a_failure_half_made_folders_go_and_others_stay(
    run: RunInput, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepared(run)
    datasets = run.data_path / "datasets"
    stale, busy = datasets / ".d4e5-1-ab", datasets / ".d4e5-2-cd"
    for folder in (stale, busy):
        folder.mkdir()
        (folder / "prompts.parquet").write_text("")
    long_ago = time.time() - 2 * ABANDONED_S
    for path in (stale / "prompts.parquet", stale):
        os.utime(path, (long_ago, long_ago))
    folder = data.run_folder(run)
    folder.open(run)
    (folder.checkpoints / "step_000010").mkdir()
    report_failure(run=run)
    assert not stale.exists()
    assert busy.exists()
    assert Path(data.folder.path).is_dir()
    said = capsys.readouterr().err
    assert f"removed {stale}" in said
    assert f"run {folder.run_id} is unfinished: a relaunch" in said


def test_a_pipeline_that_fails_reports_it_and_still_fails(
    run: RunInput, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run.data.model_copy(update={"heldout": ("nowhere.jsonl",)})
    with pytest.raises(PlainError, match="nowhere"):
        train_draft(run=run.model_copy(update={"data": data}))
    assert "report_failure" in capsys.readouterr().err
