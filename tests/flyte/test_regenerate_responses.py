"""The step that has the target answer: what it asks for, and when it does nothing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flyteidl.core import tasks_pb2
from flytekit.core import local_cache

from tasks import regenerate_responses as step
from tasks.check_run import check_run
from tasks.prepare_data import prepare_data
from tasks.regeneration_report import regeneration_report
from tasks.run_input import RunInput
from tests.flyte.test_launch_training import on_a_cluster
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.data.regenerated import RegeneratedFolder, RejectedAnswer, ShardReport

TINY = PROJECT_ROOT / "examples" / "tiny_target"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunInput]:
    monkeypatch.setattr(local_cache, "CACHE_LOCATION", str(tmp_path / "cache"))
    monkeypatch.setattr(local_cache.LocalTaskCache, "_initialized", False)
    questions = tmp_path / "questions.jsonl"
    lines = (TINY / "questions.jsonl").read_text().splitlines()
    questions.write_text("\n".join(lines[:6]) + "\n")
    values = {
        "model": {"target": str(TINY), "dtype": "float32"},
        "data": {
            "train": [str(questions)],
            "heldout": [str(TINY / "heldout.jsonl")],
            "max_length": 512,
        },
        "regeneration": {"enabled": True, "max_new_tokens": 160},
        "cluster": {"device": "cpu"},
        "data_root": str(tmp_path / "data"),
    }
    yield RunInput.model_validate(values)
    monkeypatch.undo()
    local_cache.LocalTaskCache._initialized = False


def changed(run: RunInput, section: str, **changes: Any) -> RunInput:
    values = getattr(run, section).model_copy(update=changes)
    return run.model_copy(update={section: values})


def prepared(run: RunInput) -> Any:
    """As the workflow does it."""
    checked = check_run(run=run)
    answers = step.regenerate_responses(run=run, key=checked.answers_key)
    return prepare_data(run=run, key=checked.data_key, answers=answers)


def did(capsys: pytest.CaptureFixture[str]) -> list[str]:
    titles = ("regenerate_responses", "prepare_data")
    return [line for line in capsys.readouterr().err.splitlines() if line in titles]


def test_the_target_answers_once_for_all_that_need_the_same(
    run: RunInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepared(run)
    assert did(capsys) == ["regenerate_responses", "prepare_data"]
    assert data.manifest.num_prompts == 6
    (report,) = (tmp_path / "data" / "regenerated").glob("*/report.html")
    assert "{&quot;city&quot;: &quot;Paris&quot;" in report.read_text()
    prepared(run)
    prepared(changed(run, "training", learning_rate=1e-3))
    assert did(capsys) == []
    prepared(changed(run, "draft", vocab_size=128))
    assert did(capsys) == ["prepare_data"]
    shutil.rmtree(tmp_path / "data" / "regenerated")
    prepared(run)
    assert did(capsys) == [], "prepared data need no answers"


def test_other_settings_are_other_answers_and_without_regeneration_there_are_none(
    run: RunInput,
) -> None:
    same = changed(run, "regeneration", batch_size=1)
    other = changed(run, "regeneration", seed=1)
    folders = [check_run(run=one).answers_key.split()[0] for one in (run, same, other)]
    assert folders[0] == folders[1] != folders[2]
    off = changed(run, "regeneration", enabled=False)
    assert check_run(run=off).answers_key == ""


def asked_for(run: RunInput, key: str) -> Any:
    """What the dynamic step asks Flyte for."""
    dynamic_step = step.regenerate_responses
    dynamic_step._wf = None  # compiled once a process, which is once a pod
    with on_a_cluster() as context:
        return dynamic_step.compile_into_workflow(
            context, dynamic_step._task_function, run=run, key=key
        )


@pytest.mark.parametrize(
    ("device", "inference", "num_gpus"),
    [
        ("cuda", {"inference_num_gpus": 4}, "4"),
        ("cuda", {"inference_num_gpus": 16, "inference_num_gpus_per_node": 8}, "8"),
        ("cpu", {"inference_num_gpus": 4}, None),
    ],
)
def test_a_node_with_the_gpus_of_its_engines_is_asked_for(
    run: RunInput, device: str, inference: dict[str, int], num_gpus: str | None
) -> None:
    there = changed(changed(run, "inference", **inference), "cluster", device=device)
    (node,) = asked_for(there, "some key").nodes
    kinds = tasks_pb2.Resources
    for entries in (
        node.task_node.overrides.resources.requests,
        node.task_node.overrides.resources.limits,
    ):
        found = {kinds.ResourceName.Name(entry.name): entry.value for entry in entries}
        assert found.get("GPU") == num_gpus
        assert found["CPU"] == str(8 * int(num_gpus or 1))


def test_where_nothing_is_to_be_done_no_node_is_asked_for(run: RunInput) -> None:
    assert asked_for(run, "").literals["o0"].scalar.primitive.string_value == ""


def test_the_page_says_what_was_rejected_and_why(tmp_path: Path) -> None:
    settings = {"train": ["a", "b"], "engine": "hf", "temperature": 0.7}
    folder = RegeneratedFolder(tmp_path / "0123", settings)
    rejected = RejectedAnswer(where="q.jsonl:7", reason="answer_too_long", text="On <and> on")
    report = ShardReport(
        index=0,
        num_conversations=1,
        num_answered=0,
        answer_lengths=(),
        num_generated=50,
        rejected={"answer_too_long": 1},
        examples=(rejected,),
        seconds=2.0,
    )
    with folder.claim():
        folder.write_shard(report, [])
        answers = folder.finish()
    page = regeneration_report(answers, folder)
    assert "q.jsonl:7: answer_too_long" in page
    assert "On &lt;and&gt; on" in page
    assert "No answer is usable" in page
    assert ">25<" in page  # tokens a second
    assert "2 source(s), known by their content" in page
    assert "0.7" in page
