"""Engines that answer shards side by side, each in a process of its own on the same node.

A process of its own, because SGLang changes the one it is started from, and ends with signals.
"""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from torchspec_lib import logs
from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.regenerated import RegeneratedFolder, ShardReport
from torchspec_lib.errors import TorchSpecError, WorkerLostError
from torchspec_lib.regeneration.generator import Generator
from torchspec_lib.regeneration.shard import Shard, answer_shard
from torchspec_lib.target import TargetSpec

logger = logging.getLogger(__name__)

_END_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is made from."""

    run: RunConfig
    target: TargetSpec
    folder: RegeneratedFolder
    rank: int
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them; none where the device isn't cuda."""


class Worker:
    """This side of a process with an engine."""

    def __init__(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._rank = spec.rank
        self._process = context.Process(target=_work, args=(spec, theirs), name="regeneration")
        self._process.start()
        theirs.close()  # so that reading ours ends when the process does

    def send(self, shard: Shard) -> None:
        """Have a shard answered and written; ``receive`` tells when, or why it won't be."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(shard)

    def receive(self) -> ShardReport:
        """The report on the shard that was sent.

        Raises:
            TorchSpecError: The worker's own.
            WorkerLostError: Its process died.
        """
        try:
            said: ShardReport | TorchSpecError = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._lost() from None
        if isinstance(said, TorchSpecError):
            raise said
        return said

    def end(self, deadline: float) -> None:
        """Wait for the process's end, its connection being closed; or end it then."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _lost(self) -> WorkerLostError:
        self._process.join(_END_TIMEOUT_S)
        return WorkerLostError(
            f"regeneration engine {self._rank}",
            f"its process ended with exit code {self._process.exitcode}",
        )


def answer_all(shards: Iterator[Shard], specs: Iterator[WorkerSpec]) -> Iterator[ShardReport]:
    """Answer shards with as many workers as there are ``specs``, and shards for them.

    Raises:
        TorchSpecError: A worker failed; what has been written stays.
    """
    workers: dict[Connection, Worker] = {}
    try:
        first = []
        for spec, shard in zip(specs, shards, strict=False):
            worker = Worker(spec)
            workers[worker.connection] = worker
            first.append((worker, shard))
        for worker, shard in first:  # a large one waits until it is read, so all start before it
            worker.send(shard)
        busy = dict(workers)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                yield busy[connection].receive()
                shard_left = next(shards, None)
                if shard_left is None:
                    del busy[connection]
                else:
                    workers[connection].send(shard_left)
    finally:
        for connection in workers:
            connection.close()
        deadline = time.monotonic() + _END_TIMEOUT_S
        for worker in workers.values():
            worker.end(deadline)


def _work(spec: WorkerSpec, connection: Connection) -> None:
    """The process: answer shards until there are no more, or nobody to give them."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logs.setup("regeneration", spec.rank)
    if spec.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(spec.gpus)
    try:
        with closing(_build_generator(spec)) as generator:
            _answer_shards(spec, generator, connection)
    except TorchSpecError as error:
        connection.send(error)


def _answer_shards(spec: WorkerSpec, generator: Generator, connection: Connection) -> None:
    from torchspec_lib.data.chat import ChatTokenizer  # SGLang comes before transformers

    run = spec.run
    chat = ChatTokenizer.load(
        spec.target.path, run.model.trust_remote_code, run.data.chat_template_kwargs
    )
    while True:
        try:
            shard: Shard = connection.recv()
        except EOFError:
            return
        logger.info(
            "event=answering shard=%d conversations=%d", shard.index, len(shard.conversations)
        )
        report, rows = answer_shard(shard, run, chat, generator)
        spec.folder.write_shard(report, rows)
        connection.send(report)


def _build_generator(spec: WorkerSpec) -> Generator:
    run = spec.run
    if run.inference.engine == "sglang":
        from torchspec_lib.regeneration.sgl_generator import SglGenerator

        return SglGenerator(run, spec.target)
    from torchspec_lib.regeneration.hf_generator import HFGenerator

    if run.cluster.device == "cpu":
        import torch

        torch.set_num_threads(1)  # a core each
    return HFGenerator.load(run, spec.target)


def _end_with_parent() -> None:
    """A killed parent closes nothing: don't go on answering for nobody, on its GPU."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
