"""Starts SGLang with capture in its schedulers, and says why if it doesn't start."""

import importlib.metadata
import logging
import multiprocessing
import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from torchspec_lib.errors import ConfigError, DependencyError, EngineError
from torchspec_lib.inference.engine.sgl_capture import (
    Broken,
    CaptureSettings,
    run_detokenizer,
    run_scheduler,
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
            "inference.engine is sglang, which isn't installed",
            "Run 'pip install .[sglang]' on a GPU machine, 'make sglang' on one without, or set "
            "inference.engine to hf",
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
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.utils import kill_process_tree

    class CaptureEngine(Engine):
        """SGLang's engine with its processes started by our functions."""

        run_scheduler_process_func = staticmethod(partial(run_scheduler, settings))
        run_detokenizer_process_func = staticmethod(run_detokenizer)

    os.environ["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"  # else another node's part never returns
    with ExitStack() as undo, hold_port() as port:
        undo.callback(kill_process_tree, os.getpid(), include_parent=False)
        try:
            engine = CaptureEngine(
                **arguments, nccl_port=port, custom_sigquit_handler=_leave_it_to_the_launch
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(
                "inference.sglang.extra_args", f"SGLang refuses them: {error}", "Correct them"
            ) from error
        except (RuntimeError, EOFError) as error:
            cause = _last_words(connection) or str(error)
            version = importlib.metadata.version("sglang")
            raise EngineError(f"sglang {version}", f"it didn't start: {cause}") from error
        undo.pop_all()
    settings.engine.close()  # so that reading ours ends when the scheduler does
    _unlink_shared_memory(engine)
    return engine


def _unlink_shared_memory(engine: Any) -> None:
    """Take the names of files that SGLang's processes have mapped, and would leave when killed."""
    patterns = [f"sglang_loads_{engine.port_args.instance_id}_*"]
    patterns += [f"sgl_shm_*_{child.pid}_*" for child in multiprocessing.active_children()]
    for pattern in patterns:
        for path in Path("/dev/shm").glob(pattern):
            path.unlink()


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
