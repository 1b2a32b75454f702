"""Starts SGLang, with capture in its schedulers or as it is; says why if it doesn't start."""

import importlib.metadata
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from torchspec_lib.errors import ConfigError, DependencyError, EngineError
from torchspec_lib.inference.engine.sgl_capture import CaptureSettings, run_scheduler
from torchspec_lib.inference.engine.sgl_cpu import choose_cpu
from torchspec_lib.inference.engine.sgl_processes import (
    Broken,
    run_detokenizer,
    run_plain_scheduler,
)
from torchspec_lib.ray.held_port import hold_port

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 10.0

TESTED_VERSIONS = ("0.5.17", "0.5.21")
"""Of SGLang, by this project's tests or on its GPUs."""


def check_version() -> None:
    """Warn if nobody has tried this SGLang.

    Raises:
        DependencyError: It isn't installed.
    """
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise DependencyError(
            "the engine is to be SGLang, which isn't installed",
            "Run 'pip install .[sglang]' on a GPU machine, 'make sglang' on one without, or set "
            "inference.engine and evaluation.engine to hf",
        ) from None
    if version not in TESTED_VERSIONS:
        tested = ",".join(TESTED_VERSIONS)
        logger.warning("event=untested_sglang version=%s tested=%s", version, tested)


def launch(settings: CaptureSettings, arguments: Mapping[str, Any], connection: Connection) -> Any:
    """An ``sgl.Engine`` whose schedulers capture; ``connection`` is our end of theirs.

    Raises:
        EngineError: It didn't start; its processes are gone.
        ConfigError: SGLang doesn't know an argument, or refuses its value.
    """
    engine = _start(partial(run_scheduler, settings), arguments, partial(_last_words, connection))
    settings.engine.close()  # so that reading ours ends when the scheduler does
    return engine


def launch_plain(arguments: Mapping[str, Any]) -> Any:
    """An ``sgl.Engine`` that generates, its schedulers as SGLang's makers ship them.

    From the process's main thread, before transformers is imported. Once it runs, the loss of one
    of SGLang's processes ends this one.

    Raises:
        EngineError: It didn't start; its processes are gone.
        ConfigError: SGLang doesn't know an argument, or refuses its value.
        DependencyError: It isn't installed.
    """
    check_version()
    if arguments["device"] == "cpu":
        choose_cpu(arguments["tp_size"])
    connection, theirs = multiprocessing.Pipe(duplex=False)
    with connection, theirs:
        last_words = partial(_last_words, connection)
        engine = _start(partial(run_plain_scheduler, theirs), arguments, last_words)
    # Sent when a process of SGLang's is lost. From the first call on it ends us by itself.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    return engine


def _start(
    schedule: Callable[..., None],
    arguments: Mapping[str, Any],
    last_words: Callable[[], str | None],
) -> Any:
    """An engine whose schedulers are processes of ``schedule``."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.utils import kill_process_tree

    shared_memory: list[str] = []

    class OwnEngine(Engine):
        """SGLang's engine with its processes started by our functions."""

        @classmethod
        def _launch_scheduler_processes(
            cls, server_args: Any, port_args: Any, *others: Any, **named: Any
        ) -> Any:
            """As SGLang does, which has it overridden by others; notes what a failure leaves."""
            try:
                return super()._launch_scheduler_processes(server_args, port_args, *others, **named)
            finally:
                shared_memory.extend(_shared_memory(port_args.instance_id))

        run_scheduler_process_func = staticmethod(schedule)
        run_detokenizer_process_func = staticmethod(run_detokenizer)

    os.environ["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"  # else another node's part never returns
    with ExitStack() as undo, hold_port() as port:
        undo.callback(_unlink, shared_memory)
        undo.callback(kill_process_tree, os.getpid(), include_parent=False)
        try:
            engine = OwnEngine(
                **arguments, nccl_port=port, custom_sigquit_handler=_leave_it_to_the_launch
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(
                "inference.sglang.extra_args", f"SGLang refuses them: {error}", "Correct them"
            ) from error
        except (RuntimeError, EOFError) as error:
            cause = last_words() or str(error)
            version = importlib.metadata.version("sglang")
            raise EngineError(f"sglang {version}", f"it didn't start: {cause}") from error
        undo.pop_all()
    # They have mapped it, and would leave the names when killed.
    _unlink(_shared_memory(engine.port_args.instance_id))
    return engine


def _shared_memory(instance_id: str) -> list[str]:
    """Patterns of the files that an engine's processes, those that run now, share memory by."""
    pids = [child.pid for child in multiprocessing.active_children()]
    return [f"sglang_loads_{instance_id}_*", *(f"sgl_shm_*_{pid}_*" for pid in pids)]


def _unlink(patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in Path("/dev/shm").glob(pattern):
            path.unlink(missing_ok=True)


def shut_down(engine: Any) -> None:
    """End an engine's processes, and take leave of them."""
    engine.shutdown()
    for process in multiprocessing.active_children():
        process.join(_JOIN_TIMEOUT_S)


def _last_words(connection: Connection) -> str | None:
    """Why a scheduler didn't start, if it said so."""
    try:
        said = connection.recv() if connection.poll() else None
    except EOFError:
        return None
    return said.cause if isinstance(said, Broken) else None


def _leave_it_to_the_launch(_signal: int, _frame: FrameType | None) -> None:
    """What a child's complaint does while starting. SGLang's own handler would end us."""
