"""Capture inside SGLang's scheduler processes. SGLang itself is as its makers ship it.

``run_scheduler`` is what the engine has SGLang start. A scheduler arms the target for auxiliary
states, which SGLang does for its own drafts, and hooks the recorder into the target's
``LogitsProcessor``, which every forward passes. All ranks of tensor
parallelism hold the same states; the first one stores them, from a thread of its own: the loop
that runs forwards never waits for the store.

The engine orders a sample to be stored once SGLang has answered the prompt, and is told when
it can be read. Only ids and metadata cross the border between the processes.
"""

import inspect
import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import reduce
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist
from torch import nn

from torchspec_lib.errors import EngineError, StoreFullError, StoreUnavailableError
from torchspec_lib.inference.engine.sgl_processes import Broken, run_scheduler_with
from torchspec_lib.inference.engine.sgl_recorder import (
    BATCH_FIELDS,
    FORWARD_ARGUMENTS,
    IncompleteError,
    Recorder,
)
from torchspec_lib.transfer.store import TensorStore
from torchspec_lib.types import CaptureFailure, CaptureRequest, CaptureResult, SampleKey

logger = logging.getLogger(__name__)

_NUM_WRITERS = 2
"""Samples that are put at a time."""

_SWITCH_INTERVAL_S = 0.0005
"""For how long a thread of Python may keep the others waiting. Storing a sample takes dozens of
turns, and the loop that runs forwards is busy between them: with Python's 5 ms they add up."""

Order = CaptureRequest | SampleKey
"""To store a request's sample, or to forget what was captured under a key."""


Answer = CaptureResult | Broken


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """What a scheduler process needs for capturing. Crosses over when it is started."""

    aux_layer_ids: tuple[int, ...]
    attach: Callable[[], TensorStore] | None
    """Connects to the store. None where the first rank isn't: it alone needs it."""
    engine: Connection
    """Takes ``Order``s from the engine, and ``Answer``s to it."""


def run_scheduler(settings: CaptureSettings, *args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, with capture: ready once its target is armed and hooked."""

    def prepare(scheduler: Any) -> None:
        start_capture(scheduler, settings)

    run_scheduler_with(settings.engine, prepare, *args, **kwargs)


def start_capture(scheduler: Any, settings: CaptureSettings) -> None:
    """Arm a scheduler's target; its first rank records and stores.

    Raises:
        EngineError: SGLang lacks something that capturing needs.
        StoreUnavailableError: The store isn't there.
    """
    model = find(scheduler, "tp_worker.model_runner.model")
    decoder = arm(model, settings.aux_layer_ids)
    processor = logits_processor(model)
    if dist.get_rank() != 0:
        settings.engine.close()  # so that its end can be seen when the first rank dies
        return
    assert settings.attach is not None
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    recorder = Recorder(next(model.parameters()).device)
    decoder.register_forward_pre_hook(recorder.start_moving)
    processor.register_forward_hook(recorder.hook, with_kwargs=True)
    writer = Writer(recorder, settings.attach(), settings.engine)
    threading.Thread(target=writer.run, name="capture-writer", daemon=True).start()


def arm(model: nn.Module, aux_layer_ids: tuple[int, ...]) -> nn.Module:
    """Have ``model`` give the outputs of ``aux_layer_ids`` beside its last state.

    Returns the module that runs its layers.

    SGLang counts boundaries: k lies before layer k, and so after layer k - 1. Most models turn
    layers into boundaries themselves; some (DeepSeek's, gpt-oss) take certain lists for
    boundaries already, and are set right.

    Raises:
        EngineError: The model can't.
    """
    set_layers = getattr(model, "set_eagle3_layers_to_capture", None)
    if set_layers is None:
        raise _unfit(f"{type(model).__name__}.set_eagle3_layers_to_capture")
    set_layers(list(aux_layer_ids))
    armed: list[nn.Module] = [
        module for module in model.modules() if getattr(module, "layers_to_capture", None)
    ]
    if len(armed) != 1:
        raise _unfit(f"layers_to_capture in one module of {type(model).__name__}")
    boundaries = [layer_id + 1 for layer_id in aux_layer_ids]
    decoder: Any = armed[0]
    if list(decoder.layers_to_capture) != boundaries:
        decoder.layers_to_capture = boundaries
    return armed[0]


def logits_processor(model: nn.Module) -> nn.Module:
    """The one module that sees a forward's states, its prompts and their lengths.

    Raises:
        EngineError: There isn't exactly one, or it isn't called as the recorder expects.
    """
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    found: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, LogitsProcessor)
    ]
    if len(found) != 1:
        raise _unfit(f"exactly one LogitsProcessor in {type(model).__name__}, but {len(found)},")
    names = tuple(inspect.signature(LogitsProcessor.forward).parameters)[1:]
    if names[: len(FORWARD_ARGUMENTS)] != FORWARD_ARGUMENTS:
        raise _unfit(f"LogitsProcessor.forward({', '.join(FORWARD_ARGUMENTS)})")
    missing = set(BATCH_FIELDS) - {field.name for field in fields(ForwardBatch)}
    if missing:
        raise _unfit(f"ForwardBatch.{' and .'.join(sorted(missing))}")
    return found[0]


def find(root: Any, path: str) -> Any:
    """An attribute of an attribute.

    Raises:
        EngineError: It isn't there, so this isn't the SGLang that capture was written for.
    """
    try:
        return reduce(getattr, path.split("."), root)
    except AttributeError as error:
        raise _unfit(f"{type(root).__name__}.{path}") from error


def _unfit(what: str) -> EngineError:
    return EngineError("sglang", f"this version has no {what} to capture with")


class Writer:
    """Stores samples as the engine orders them, and answers each order."""

    def __init__(self, recorder: Recorder, store: TensorStore, engine: Connection) -> None:
        self._recorder, self._store, self._engine = recorder, store, engine
        self._sending = threading.Lock()

    def run(self) -> None:
        """Work until the engine is gone."""
        with ThreadPoolExecutor(_NUM_WRITERS, "capture-put") as pool:
            while True:
                try:
                    order: Order = self._engine.recv()
                except (EOFError, ConnectionResetError):
                    return
                if isinstance(order, SampleKey):
                    self._recorder.forget(str(order))
                else:
                    pool.submit(self._store_sample, order).add_done_callback(self._answer)

    def _store_sample(self, request: CaptureRequest) -> CaptureResult:
        try:
            sample = self._recorder.take(str(request.key), request.prompt)
            return self._store.put(request.key, sample)
        except IncompleteError as error:
            return CaptureFailure(request.key, str(error), "engine")
        except (StoreFullError, StoreUnavailableError) as error:
            return CaptureFailure(request.key, str(error), "store")

    def _answer(self, done: Future[CaptureResult]) -> None:
        error = done.exception()
        answer: Answer = done.result() if error is None else Broken(repr(error))
        with self._sending:
            self._engine.send(answer)
