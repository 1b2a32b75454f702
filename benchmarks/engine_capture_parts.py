"""The processes of ``benchmarks.engine_capture``: an engine of each kind, and a reader.

Each engine has a process of its own, since SGLang changes the one that starts it.
"""

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from torchspec_lib.inference.engine.sgl_cpu import choose_cpu
from torchspec_lib.inference.engine.sgl_engine import SglEngine
from torchspec_lib.inference.engine.sgl_processes import run_detokenizer
from torchspec_lib.target import TargetSpec
from torchspec_lib.transfer.memory import MemoryStore
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.specs import describe
from torchspec_lib.transfer.store import StoreAddress, TensorStore
from torchspec_lib.types import CaptureFailure, CaptureRequest, Prompt, SampleKey, SampleRef

HOST = "127.0.0.1"
START_TIMEOUT_S, ROUND_TIMEOUT_S = 500.0, 300.0
READERS = 2
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Setup:
    """What every engine has in common."""

    target: TargetSpec
    aux_layer_ids: tuple[int, ...]
    arguments: Mapping[str, Any]
    """SGLang's."""
    address: StoreAddress
    in_flight: int
    """Prompts that are sent before the first is answered."""


class Sink(MemoryStore):
    """Forgets samples, which have come to host memory by then."""

    def put(self, key: SampleKey, tensors: Mapping[str, Tensor]) -> SampleRef:
        num_tokens, specs = describe(tensors)
        return SampleRef(key, 0, num_tokens, specs)


class PlainEngine:
    """SGLang as it is."""

    def __init__(self, setup: Setup) -> None:
        from sglang.srt.entrypoints.engine import Engine

        class WithOurStart(Engine):  # type: ignore[misc, unused-ignore] # it comes without types
            """On a CPU its processes need what our engine's need."""

            run_scheduler_process_func = staticmethod(run_plain_scheduler)
            run_detokenizer_process_func = staticmethod(run_detokenizer)

        self._engine = WithOurStart(**setup.arguments)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, request: CaptureRequest) -> None:
        work = self._engine.async_generate(
            input_ids=request.prompt.token_ids.tolist(),
            rid=str(request.key),
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
        )
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._engine.shutdown()


def run_plain_scheduler(*args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, as it is."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(*args, **kwargs)


class CapturingEngine:
    """Ours; refs of what it has stored go to ``readers``, if there are any."""

    def __init__(self, setup: Setup, attach: Callable[..., TensorStore], readers: Any) -> None:
        own = MemoryStore(0)
        self._engine = SglEngine(
            setup.target, setup.aux_layer_ids, own, attach, dict(setup.arguments)
        )
        self._readers = readers

    def run(self, request: CaptureRequest) -> None:
        (result,) = self._engine.capture([request])
        if isinstance(result, CaptureFailure):
            raise RuntimeError(result.reason)
        if self._readers is not None:
            self._readers.put(result)

    def close(self) -> None:
        self._engine.close()


def _build(variant: str, setup: Setup, readers: Any) -> PlainEngine | CapturingEngine:
    if variant == "plain":
        return PlainEngine(setup)
    if variant == "pinned":
        return CapturingEngine(setup, partial(Sink, 0), None)
    return CapturingEngine(setup, partial(connect, setup.address, HOST, False), readers)


def _serve(connection: Connection, variant: str, setup: Setup, readers: Any) -> None:
    """Run lists of prompts, and answer each with the seconds it took."""
    if setup.arguments["device"] == "cpu":
        choose_cpu(1)
    engine = _build(variant, setup, readers)
    connection.send("up")
    try:
        with ThreadPoolExecutor(setup.in_flight) as pool:
            while True:
                requests = [
                    CaptureRequest(SampleKey.first("benchmark", 0, prompt.prompt_id), prompt)
                    for prompt in connection.recv()
                ]
                start = time.perf_counter()
                for _ in pool.map(engine.run, requests):
                    pass
                connection.send(time.perf_counter() - start)
    except EOFError:
        engine.close()


class EngineProcess:
    """An engine that runs lists of prompts."""

    def __init__(self, variant: str, setup: Setup, readers: Any) -> None:
        self._connection, theirs = SPAWN.Pipe()
        arguments = theirs, variant, setup, readers
        self._process = SPAWN.Process(target=_serve, args=arguments, name=variant)
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it is up."""
        self._answer(START_TIMEOUT_S)

    def send(self, prompts: Sequence[Prompt]) -> None:
        self._connection.send(prompts)

    def seconds(self) -> float:
        """That the prompts sent last took."""
        seconds: float = self._answer(ROUND_TIMEOUT_S)
        return seconds

    def _answer(self, timeout_s: float) -> Any:
        if not self._connection.poll(timeout_s):
            raise TimeoutError(f"engine {self._process.name!r} doesn't answer")
        return self._connection.recv()

    def stop(self) -> None:
        self._connection.close()
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()


class Reader:
    """A process that copies samples out of the store and frees them, as a trainer does."""

    def __init__(self, address: StoreAddress) -> None:
        self.refs: Any = SPAWN.SimpleQueue()
        self._read: Any = SPAWN.SimpleQueue()
        arguments = address, self.refs, self._read
        self._process = SPAWN.Process(target=_read_all, args=arguments, name="reader")
        self._process.start()

    def wait_for(self, num_samples: int) -> float:
        """Until it has read so many more. Returns the seconds that its threads were at it."""
        return sum(self._read.get() for _ in range(num_samples))

    def stop(self) -> None:
        for _ in range(READERS):
            self.refs.put(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def _read_all(address: StoreAddress, refs: Any, read: Any) -> None:
    store = connect(address, HOST, owns_memory=False)

    def work() -> None:
        while (ref := refs.get()) is not None:
            start = time.perf_counter()
            sample = store.get(ref, torch.device("cpu"))
            store.release([ref.key])
            assert len(sample["last_hidden_states"]) == ref.num_tokens
            read.put(time.perf_counter() - start)

    threads = [threading.Thread(target=work) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
