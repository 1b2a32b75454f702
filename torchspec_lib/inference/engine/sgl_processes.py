"""What SGLang starts its processes with: its own functions, and a scheduler that says why it ends.

SGLang only logs what ended a scheduler, and guesses at a lack of memory.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from torchspec_lib.errors import EngineError
from torchspec_lib.inference.engine import sgl_cpu

sgl_cpu.stand_in_where_chosen()  # a child imports this module before anything of SGLang's


@dataclass(frozen=True, slots=True)
class Broken:
    """A scheduler's last words."""

    cause: str


def run_plain_scheduler(engine: Connection, *args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, as it is."""
    run_scheduler_with(engine, lambda _scheduler: None, *args, **kwargs)


def run_detokenizer(*args: Any, **kwargs: Any) -> None:
    """SGLang's detokenizer process, as it is."""
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    run_detokenizer_process(*args, **kwargs)


def run_scheduler_with(
    engine: Connection, prepare: Callable[[Any], None], *args: Any, **kwargs: Any
) -> None:
    """SGLang's scheduler process, ready once its ``Scheduler`` is prepared.

    Args:
        engine: Takes a ``Broken`` if an error ends it.
        prepare: Is given the scheduler, its target loaded.
        *args: SGLang's.
        **kwargs: SGLang's.
    """
    import sglang.srt.managers.scheduler as scheduler_module

    class PreparedScheduler(scheduler_module.Scheduler):
        """SGLang's, prepared, with last words."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with _LastWords(engine):
                super().__init__(*args, **kwargs)
                prepare(self)

        def run_event_loop(self) -> None:
            with _LastWords(engine):
                super().run_event_loop()

    scheduler_module.Scheduler = PreparedScheduler
    scheduler_module.run_scheduler_process(*args, **kwargs)


class _LastWords:
    """Tells the engine what ended this process."""

    def __init__(self, engine: Connection) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None and not self._engine.closed:
            cause = error.cause if isinstance(error, EngineError) else repr(error)
            with suppress(BrokenPipeError):  # nobody listens any more
                self._engine.send(Broken(cause))
