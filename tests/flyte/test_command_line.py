"""The command as a user types it: fast help, and mistakes told in a sentence."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from flytekit.clis.sdk_in_container import pyflyte as command_line

from torchspec_lib.config.settings import PROJECT_ROOT

WORKFLOW = "workflows/train_draft.py"
PYFLYTE = Path(sys.executable).with_name("pyflyte")
HEAVY_MODULES = ("torch", "ray._raylet", "transformers", "mlflow", "matplotlib")
"""flytekit itself puts a lazy ``ray`` in ``sys.modules``; its core is loaded on first use."""


def pyflyte(
    *arguments: str, temp_dir: Path, cwd: Path = PROJECT_ROOT
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TMPDIR": str(temp_dir), "COLUMNS": "200"}
    return subprocess.run(
        [PYFLYTE, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def inputs_with(settings: dict[str, Any], folder: Path) -> Path:
    """The demo's configuration, changed by ``settings``."""
    run = yaml.safe_load((PROJECT_ROOT / "configs/tiny.yaml").read_text())["run"]
    run["data_root"] = str(folder / "data")
    for path, value in settings.items():
        *parents, name = path.split(".")
        section = run
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    inputs = folder / "inputs.yaml"
    inputs.write_text(yaml.safe_dump({"run": run}))
    return inputs


def refused(settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command says to such a run, which it must refuse. In this process: many ask."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(PROJECT_ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    inputs = inputs_with(settings, folder)
    command = ["run", WORKFLOW, "train_draft", "--inputs-file", str(inputs)]
    result = CliRunner().invoke(command_line.main, command)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit | click.ClickException)
    assert "Traceback" not in result.output
    return words(result.output)


def words(output: str) -> str:
    """What the command said, without the frame around it."""
    return " ".join(output.replace("│", " ").split())


def child_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_takes_less_than_three_seconds_and_offers_the_workflow(tmp_path: Path) -> None:
    before = child_cpu_s()
    finished = pyflyte("run", WORKFLOW, "--help", temp_dir=tmp_path)
    cpu_s = child_cpu_s() - before  # the processor's seconds: others use this machine too
    assert finished.returncode == 0
    assert "train_draft" in finished.stdout
    assert "prepare_data" not in finished.stdout
    assert cpu_s < 3.0


def test_loading_the_workflow_imports_nothing_heavy() -> None:
    code = f"""
import json, sys
from click.testing import CliRunner
from flytekit.clis.sdk_in_container import pyflyte
result = CliRunner().invoke(pyflyte.main, ["run", {WORKFLOW!r}, "train_draft", "--help"])
assert result.exit_code == 0, result.output
print(json.dumps([name for name in {HEAVY_MODULES!r} if name in sys.modules]))
"""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(finished.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"training.learning_rat": 0.1},
            "run.training.learning_rat: there is no such setting. Did you mean learning_rate?",
        ),
        ({"sede": 1}, "run.sede: there is no such setting. Did you mean seed?"),
        (
            {"inference.sglang": {"tp_sise": 2}},
            "run.inference.sglang.tp_sise: there is no such setting. Did you mean tp_size?",
        ),
        ({"registry.model_name": "me/draft"}, "run.registry.model_name: string should match"),
        ({"model.target": "Qwen/Qwen3 8B"}, "run.model.target: 'Qwen/Qwen3 8B' is no folder here"),
        (
            {"training.learning_rate": -0.1},
            "run.training.learning_rate: input should be greater than 0, not -0.1",
        ),
        ({"training.betas": [0.9, 2]}, "run.training.betas[1]: input should be less than 1"),
        (
            {"training.min_learning_rate": 1.0},
            "run.training: min_learning_rate (1.0) must not exceed learning_rate (0.005)",
        ),
        (
            {"training.micro_batch_tokens": 16},
            "run.training.micro_batch_tokens (16) must hold the longest sample: raise it, or "
            "lower run.data.max_length (512)",
        ),
        ({"data.train": ["nowhere.jsonl"]}, "run.data.train[0]: 'nowhere.jsonl' doesn't exist"),
        ({"model.target": "./nowhere"}, "run.model.target: './nowhere' doesn't exist"),
        (
            {"data.chat_template_kwargs": {"enable_thinking": None}},
            "run.data.chat_template_kwargs.enable_thinking: must be true, false, a number",
        ),
        ({"draft.aux_layer_ids": [1, 99]}, "run.draft.aux_layer_ids: layer 99 doesn't exist"),
        (
            {"transfer.max_in_flight_bytes": 100_000},
            "run.transfer.max_in_flight_bytes: 100,000 bytes in flight can't hold a global batch",
        ),
        (
            {"cluster.device": "cuda", "inference.inference_num_gpus": 500},
            "Lower run.training.training_num_gpus_per_node or run.inference.inference_num_gpus",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_told_in_a_sentence(
    settings: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert expected in refused(settings, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"sede": 1}, "Did you mean seed?"), ({"data.train": ["nowhere.jsonl"]}, "doesn't exist")],
)
def test_a_refused_command_takes_seconds_shows_no_traceback_and_leaves_no_temporary_folder(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    temp_dir = tmp_path / "temp"
    temp_dir.mkdir()
    inputs, before = inputs_with(settings, tmp_path), child_cpu_s()
    command = ("run", WORKFLOW, "train_draft", "--inputs-file", str(inputs))
    finished = pyflyte(*command, temp_dir=temp_dir)
    said = words(finished.stdout + finished.stderr)
    assert finished.returncode == 1
    assert expected in said
    assert "Traceback" not in said
    assert child_cpu_s() - before < 5.0
    assert list(temp_dir.iterdir()) == []


def test_a_broken_line_of_the_conversations_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = (PROJECT_ROOT / "examples/tiny_target/train.jsonl").read_text().splitlines()[:2]
    conversations = tmp_path / "conversations.jsonl"
    conversations.write_text("\n".join([*good, '{"messages": [']))
    said = refused({"data.train": [str(conversations)]}, tmp_path, monkeypatch)
    assert f"{conversations}:3: is not valid JSON" in said


def test_every_mistake_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused({"sede": 1, "training.num_epochs": 0}, tmp_path, monkeypatch)
    assert "run.sede" in said
    assert "run.training.num_epochs" in said
