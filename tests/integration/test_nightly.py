"""What a night trains: the conversations that arrived since the champion's, from the champion."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.candidates import make_candidate
from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import ConfigError
from torchspec_lib.nightly import plan_night
from torchspec_lib.registry.registry import register_draft
from torchspec_lib.target import read_target

MONDAY = datetime(2026, 11, 23, 2, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


@pytest.fixture
def run(tmp_path: Path, inbox: Path) -> RunConfig:
    values = {
        "model": {"target": "examples/tiny_target"},
        "data": {"train": [str(inbox)], "heldout": ["b.jsonl"]},
        "data_root": str(tmp_path / "data"),
    }
    return RunConfig.model_validate(values)


def arrive(inbox: Path, name: str, when: datetime) -> str:
    file = inbox / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    os.utime(file, (when.timestamp(), when.timestamp()))
    return str(file)


def register(run: RunConfig, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    metrics = folder.with_suffix(".jsonl")
    metrics.write_text("")
    target = read_target(run.model)
    register_draft(run, make_candidate(folder, target=target, step_metrics=metrics))


def test_the_first_night_takes_all_that_is_there(run: RunConfig, inbox: Path) -> None:
    early = arrive(inbox, "a.jsonl", MONDAY - 30 * DAY)
    late = arrive(inbox, "deep/b.parquet", MONDAY - DAY)
    arrive(inbox, "c.jsonl", MONDAY + DAY)  # after the night has begun
    arrive(inbox, "notes.txt", MONDAY - DAY)
    night = plan_night(run, MONDAY)
    assert night.run.data.train == (early, late)
    assert night.num_files == 2
    assert night.since is None
    assert night.run.training.continual_from is None
    assert night.run.registry.only_better


def test_a_night_goes_on_where_the_champion_ends_and_starts_from_it(
    run: RunConfig, inbox: Path, tmp_path: Path
) -> None:
    arrive(inbox, "a.jsonl", MONDAY - DAY)
    register(plan_night(run, MONDAY).run, tmp_path / "draft")
    new = arrive(inbox, "b.jsonl", MONDAY + timedelta(hours=1))
    night = plan_night(run, MONDAY + DAY)
    assert night.run.data.train == (new,)
    assert night.since == MONDAY
    start = Path(night.run.training.continual_from or "")
    assert (start / "model.safetensors").read_bytes() == b"weights"
    again = plan_night(run, MONDAY + DAY)
    assert again == night  # a relaunch is the same run, and resumes


def test_a_night_that_registered_nothing_leaves_its_prompts_to_the_next(
    run: RunConfig, inbox: Path, tmp_path: Path
) -> None:
    arrive(inbox, "a.jsonl", MONDAY - DAY)
    register(plan_night(run, MONDAY).run, tmp_path / "draft")
    first = arrive(inbox, "b.jsonl", MONDAY + timedelta(hours=1))
    plan_night(run, MONDAY + DAY)  # and its draft is no better
    second = arrive(inbox, "c.jsonl", MONDAY + DAY + timedelta(hours=1))
    assert plan_night(run, MONDAY + 2 * DAY).run.data.train == (first, second)


def test_without_anything_new_there_is_nothing_to_train(run: RunConfig, inbox: Path) -> None:
    arrive(inbox, "a.jsonl", MONDAY + DAY)
    assert plan_night(run, MONDAY).num_files == 0


def test_files_and_data_sets_beside_the_folder_stay(run: RunConfig, inbox: Path) -> None:
    new = arrive(inbox, "a.jsonl", MONDAY - DAY)
    train = ("base.jsonl", "org/dataset", str(inbox))
    both = run.model_copy(update={"data": run.data.model_copy(update={"train": train})})
    assert plan_night(both, MONDAY).run.data.train == ("base.jsonl", "org/dataset", new)


def test_a_folder_with_a_dot_in_its_name_is_one(run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "chats-v1.5"
    folder.mkdir()
    new = arrive(folder, "a.jsonl", MONDAY - DAY)
    train = ("teknium/OpenHermes-2.5", str(folder))
    dotted = run.model_copy(update={"data": run.data.model_copy(update={"train": train})})
    assert plan_night(dotted, MONDAY).run.data.train == ("teknium/OpenHermes-2.5", new)


def test_a_folder_that_is_not_there_is_an_error(run: RunConfig, tmp_path: Path) -> None:
    data = run.data.model_copy(update={"train": (str(tmp_path / "nowhere"),)})
    with pytest.raises(ConfigError, match=r"data.train\[0\]"):
        plan_night(run.model_copy(update={"data": data}), MONDAY)
