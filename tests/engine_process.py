"""An SGLang engine in a process of its own: SGLang changes the process that starts it."""

import multiprocessing
import threading
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import psutil

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import TorchSpecError
from torchspec_lib.inference.engine.sgl_arguments import WHOLE, Part
from torchspec_lib.target import TargetSpec
from torchspec_lib.transfer.store import StoreAddress

HOST = "127.0.0.1"
TIMEOUT_S = 180.0
PUT_TIMEOUT_S = 0.5


class EngineProcess:
    """Has an ``SglEngine`` do what it is told; errors come back as themselves."""

    def __init__(
        self, run: RunConfig, target: TargetSpec, address: StoreAddress, part: Part = WHOLE
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._beside, their_beside = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, their_beside, run, target, address, part), daemon=False
        )
        self.process.start()
        theirs.close()
        their_beside.close()

    def wait(self) -> None:
        """Until the engine is up. Raises what kept it from starting."""
        self.answer()

    def call(self, method: str, *args: Any) -> Any:
        self.send(method, *args)
        return self.answer()

    def send(self, method: str, *args: Any) -> None:
        self._connection.send((method, args))

    def call_beside(self, method: str, *args: Any) -> None:
        """Without an answer, while another call is being worked on."""
        self._beside.send((method, args))

    def answer(self) -> Any:
        """To what was sent."""
        if not self._connection.poll(TIMEOUT_S):
            raise TimeoutError("the engine's process doesn't answer")
        result = self._connection.recv()
        if isinstance(result, TorchSpecError):
            raise result
        return result

    def children(self) -> list[psutil.Process]:
        """SGLang's processes."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> None:
        self._connection.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()


def _serve(
    connection: Connection,
    beside: Connection,
    run: RunConfig,
    target: TargetSpec,
    address: StoreAddress,
    part: Part,
) -> None:
    from torchspec_lib.inference.factory import EngineSpec, build_engine, build_part
    from torchspec_lib.transfer.mooncake.connect import connect

    attach = partial(connect, address, HOST, False, PUT_TIMEOUT_S, PUT_TIMEOUT_S)
    store, spec = attach(), EngineSpec(run, target, 0, address, part)
    try:
        first = part.node_rank == 0
        engine = build_engine(spec, store, None, attach) if first else build_part(spec)
    except TorchSpecError as error:
        connection.send(error)
        return
    connection.send("up")
    threading.Thread(target=_serve_beside, args=(beside, engine), daemon=True).start()
    try:
        while True:
            method, args = connection.recv()
            try:
                connection.send(getattr(engine, method)(*args))
            except TorchSpecError as error:
                connection.send(error)
    except EOFError:
        engine.close()
        store.close()


def _serve_beside(connection: Connection, engine: Any) -> None:
    while True:
        method, (key,) = connection.recv()
        assert method == "abort"
        sglang = engine._engine
        engine._loop.call_soon_threadsafe(sglang.tokenizer_manager.abort_request, str(key))


def run_config(target: str, aux_layer_ids: Sequence[int] = (0, 2, 4), **sglang: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"target": target, "dtype": "float32"},
            "data": {"train": ["-"], "heldout": ["-"], "max_length": 250},
            "draft": {"aux_layer_ids": aux_layer_ids},
            "inference": {
                "engine": "sglang",
                "inference_num_gpus": sglang.get("tp_size", 1),
                "sglang": {"prefill_tokens": 16, **sglang},
            },
            "cluster": {"device": "cpu"},
        }
    )
