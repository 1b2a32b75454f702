"""The frame around every task's work, on a person's machine and on a cluster."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flytekit import FlyteContextManager
from flytekit.core.context_manager import ExecutionState
from flytekit.exceptions.base import FlyteRecoverableException

from tasks.stage import PlainError, stage
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.errors import ConfigError, WorkerLostError


@contextmanager
def on_a_cluster() -> Iterator[None]:
    context = FlyteContextManager.current_context()
    assert context.execution_state is not None
    state = context.execution_state.with_params(mode=ExecutionState.Mode.TASK_EXECUTION)
    with FlyteContextManager.with_context(context.with_execution_state(state)):
        yield


def test_a_local_failure_is_plain_and_names_settings_in_full() -> None:
    error = ConfigError("data.train[0]", "it is empty", "Add some, or lower training.num_epochs")
    with pytest.raises(PlainError) as told, stage("prepare_data"):
        raise error
    assert told.value.message == (
        "run.data.train[0]: it is empty. Add some, or lower run.training.num_epochs"
    )
    assert told.value.exit_code == 1


def test_a_local_loss_says_how_to_go_on() -> None:
    with pytest.raises(PlainError, match="Run the same command again"), stage("train_draft"):
        raise WorkerLostError("trainer rank 1", "killed")


def test_on_a_cluster_an_error_stays_what_it_is() -> None:
    with on_a_cluster(), pytest.raises(ConfigError), stage("prepare_data"):
        raise ConfigError("data.train", "it is empty", "Add some")


def test_on_a_cluster_a_loss_is_worth_a_retry_in_every_task() -> None:
    with on_a_cluster(), pytest.raises(FlyteRecoverableException), stage("evaluate_checkpoint"):
        raise WorkerLostError("engine 0", "killed")


def test_an_unforeseen_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), stage("prepare_data"):
        _ = 1 / 0


def test_a_stage_takes_the_time_until_it_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("prepare_data") as watch:
        first = watch.elapsed_s
        second = watch.elapsed_s
    assert 0 < first < second < 60
    assert capsys.readouterr().err.startswith("prepare_data\n  done in 0.0 s")


def test_a_process_removes_its_own_sandboxes_and_no_other(tmp_path: Path) -> None:
    other = tmp_path / "flyte-of-another-process"
    other.mkdir()
    code = f"import tasks.stage, os; assert len(os.listdir({str(tmp_path)!r})) > 1"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, env=environment, check=True, timeout=60
    )
    assert list(tmp_path.iterdir()) == [other]
