"""What every task does around its work: tell the user, take the time, leave nothing behind."""

import atexit
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
import flytekit.configuration
import flytekit.core.data_persistence
from flytekit import FlyteContextManager
from flytekit.core.context_manager import ExecutionState
from flytekit.exceptions.base import FlyteRecoverableException

from tasks.run_input import with_full_paths
from torchspec_lib import logs
from torchspec_lib.errors import RecoverableError, TorchSpecError

logger = logging.getLogger(__name__)


class PlainError(click.ClickException):
    """A failure told in a sentence: ``pyflyte run`` prints it without a traceback, exit code 1."""


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start


@contextmanager
def stage(title: str) -> Iterator[Stopwatch]:
    """The frame of a task's work.

    In a local run, errors that this project raises on purpose become a ``PlainError``. On a
    cluster they stay what they are, and Flyte shows them as the user's; but for what another
    try can cure, which its retries count.
    """
    watch = Stopwatch()
    # torch's default is a folder in /tmp, which it makes on import and leaves.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache/torch/inductor"))
    # A person at a terminal is told by titles and progress bars, a pod's log by events.
    logs.setup("driver", level=logging.WARNING if is_local() else logging.INFO)
    with terminable():
        if not is_local():
            with retryable():
                yield watch
            return
        click.secho(title, bold=True, err=True)
        try:
            yield watch
        except TorchSpecError as error:
            logger.debug("event=stage_failed stage=%s", title, exc_info=True)
            raise PlainError(_plain_text(error)) from error
        click.secho(f"  done in {watch.elapsed_s:.1f} s", dim=True, err=True)


def tell(text: str) -> None:
    """Say something to whoever watches: on the terminal, or in a pod's log."""
    if is_local():
        click.echo(f"  {text}", err=True)
    else:
        logger.info("%s", text)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM, a pod's preemption say, unwind the stack instead of cutting it off."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def retryable() -> Iterator[None]:
    """Make what another try can cure Flyte's recoverable error: nothing else is tried again."""
    try:
        yield
    except RecoverableError as error:
        raise FlyteRecoverableException(str(error)) from error


def is_local() -> bool:
    """Whether this is ``pyflyte run`` on the user's machine, or a call from Python."""
    state = FlyteContextManager.current_context().execution_state
    return state is None or state.mode is not ExecutionState.Mode.TASK_EXECUTION


def _exit(signal_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signal_number)


def _plain_text(error: TorchSpecError) -> str:
    text = with_full_paths(str(error))
    if isinstance(error, RecoverableError):
        return f"{text}. Run the same command again: it goes on from its last checkpoint"
    return text


def _remove_sandboxes() -> None:
    """Remove the folders that flytekit makes for this process on import, and leaves."""
    sandboxes = {
        Path(flytekit.configuration.Config.local_sandbox_path),
        Path(flytekit.core.data_persistence.flyte_tmp_dir),
    }
    for sandbox in sandboxes:
        if sandbox.parent == Path(tempfile.gettempdir()):  # else the user chose it
            shutil.rmtree(sandbox, ignore_errors=True)


atexit.register(_remove_sandboxes)
