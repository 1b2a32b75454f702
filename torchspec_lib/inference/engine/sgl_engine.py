"""An engine that runs the target through SGLang, unpatched: many prompts a forward, many GPUs.

``SglEngine`` keeps a window of prompts in SGLang, which batches them as it likes. Each leaves the
window when its sample can be read, whatever became of the others, and the next one enters.
What happens inside SGLang's own processes is in ``sgl_capture``.
"""

import asyncio
import multiprocessing
import signal
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchspec_lib.errors import EngineError
from torchspec_lib.inference.engine.base import SelfCheck
from torchspec_lib.inference.engine.checks import problem_of
from torchspec_lib.inference.engine.sgl_capture import Answer, CaptureSettings, Order
from torchspec_lib.inference.engine.sgl_check import check_capture
from torchspec_lib.inference.engine.sgl_launch import check_version, launch, shut_down
from torchspec_lib.inference.engine.sgl_processes import Broken
from torchspec_lib.inference.engine.token_window import TokenWindow
from torchspec_lib.target import TargetSpec
from torchspec_lib.transfer.store import TensorStore
from torchspec_lib.types import (
    CaptureFailure,
    CaptureRequest,
    CaptureResult,
    Prompt,
    SampleKey,
)

_T = TypeVar("_T")

WINDOW_FORWARDS = 3
"""Full forwards in the window: one runs, one waits, one is being stored."""

_JOIN_TIMEOUT_S = 10.0
_LAST_WORDS_S = 1.0
"""For a dying process to say why."""


class SglEngine:
    """A replica of the target in SGLang, or the part of one that answers."""

    def __init__(
        self,
        target: TargetSpec,
        aux_layer_ids: Sequence[int],
        store: TensorStore,
        attach: Callable[[], TensorStore],
        arguments: Mapping[str, Any],
    ) -> None:
        """Start SGLang, from the process's main thread.

        Args:
            target: The target model.
            aux_layer_ids: Ascending; not the last layer.
            store: This process's connection to the store, for checks.
            attach: Connects SGLang's process to the same store. Picklable.
            arguments: SGLang's ``ServerArgs``; see ``sgl_arguments``.

        Raises:
            EngineError: SGLang didn't start, or can't capture from this target.
            ConfigError: SGLang doesn't know an argument, or refuses its value.
        """
        check_version()
        self._target, self._store = target, store
        self._aux_layer_ids, self._arguments = tuple(aux_layer_ids), arguments
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        settings = CaptureSettings(self._aux_layer_ids, attach, theirs)
        self._engine = launch(settings, arguments, self._connection)
        signal.signal(signal.SIGQUIT, self._on_child_death)
        self._window = TokenWindow(WINDOW_FORWARDS * int(arguments["max_prefill_tokens"]))
        self._answers: dict[SampleKey, asyncio.Future[CaptureResult]] = {}
        self._loop = asyncio.new_event_loop()
        self._broken: asyncio.Future[str] = self._loop.create_future()
        """Why no more can be captured."""
        self._loop.add_reader(self._connection.fileno(), self._receive)
        self._thread = threading.Thread(target=self._loop.run_forever, name="sgl", daemon=True)
        self._thread.start()

    def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        """Capture ``requests``: one result each, in order. Several threads may call it at once.

        Raises:
            EngineError: A process of SGLang's died.
        """
        return self._run(self._capture(requests))

    async def _capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        return await asyncio.gather(*(self._capture_one(request) for request in requests))

    async def _capture_one(self, request: CaptureRequest) -> CaptureResult:
        problem = problem_of(request.prompt, self._target)
        if problem is not None:
            return CaptureFailure(request.key, problem, "prompt")
        async with self._window.room(request.prompt.num_tokens):
            try:
                reply = await self._generate(str(request.key), request.prompt)
            except ValueError as error:  # SGLang's own limits
                return CaptureFailure(request.key, str(error), "prompt")
            finish = reply["meta_info"]["finish_reason"]
            if finish["type"] == "abort":
                self._order(request.key)
                return CaptureFailure(request.key, f"SGLang gave up: {finish}", "engine")
            answer: asyncio.Future[CaptureResult] = self._loop.create_future()
            self._answers[request.key] = answer
            self._order(request)
            return await answer

    async def _generate(self, rid: str, prompt: Prompt, **options: Any) -> dict[str, Any]:
        """Run a prompt. One token is drawn, since SGLang answers no sooner than that."""
        reply: dict[str, Any] = await self._engine.async_generate(
            input_ids=prompt.token_ids.tolist(),
            rid=rid,
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            **options,
        )
        return reply

    def self_check(self) -> SelfCheck:
        """Compare captured states with what SGLang itself, and if affordable transformers, say.

        Raises:
            EngineError: They differ: a layer off by one, a missing norm, a wrong dtype or order.
        """
        return check_capture(
            self._target,
            self._aux_layer_ids,
            self._arguments["dtype"],
            self._arguments["trust_remote_code"],
            self.sample,
            self._log_probs,
        )

    def sample(self, prompt: Prompt) -> dict[str, Tensor]:
        """What a trainer would read of ``prompt``. For checks.

        Raises:
            EngineError: It can't be captured.
        """
        key = SampleKey.first("self-check", 0, prompt.prompt_id)
        (result,) = self.capture([CaptureRequest(key, prompt)])
        if isinstance(result, CaptureFailure):
            raise EngineError("sglang", f"a check's prompt wasn't captured: {result.reason}")
        sample = self._store.get(result, torch.device("cpu"))
        self._store.release([key])
        return sample

    def _log_probs(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """SGLang's own log-probabilities [T-1] of a prompt's tokens from the second on.

        And the ids [T-1] that were likeliest there.
        """
        key = SampleKey.first("self-check", 0, prompt.prompt_id)
        asked = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
        reply = self._run(self._generate(str(key), prompt, **asked))["meta_info"]
        self._order(key)
        log_probs = [entry[0] for entry in reply["input_token_logprobs"][1:]]
        likeliest = [entries[0][1] for entries in reply["input_top_logprobs"][1:]]
        return torch.tensor(log_probs), torch.tensor(likeliest)

    def close(self) -> None:
        """End SGLang's processes. Safe to call twice."""
        if self._loop.is_closed():
            return
        self.fail("it is closed")
        shut_down(self._engine)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_TIMEOUT_S)
        self._connection.close()
        self._loop.close()

    # What moves between this process's threads, and from SGLang's processes

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do ``work`` in the loop's thread, unless the engine breaks first."""
        if self._loop.is_closed():
            work.close()
            raise EngineError("sglang", "it is closed")
        return asyncio.run_coroutine_threadsafe(self._unless_broken(work), self._loop).result()

    async def _unless_broken(self, work: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._broken}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            raise EngineError("sglang", self._broken.result())
        return task.result()

    def _order(self, order: Order) -> None:
        """Have SGLang's process store a sample, or forget it."""
        try:
            self._connection.send(order)
        except OSError as error:
            raise EngineError("sglang", "its scheduler process died") from error

    def _receive(self) -> None:
        """Take what SGLang's process says."""
        try:
            answer: Answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._loop.remove_reader(self._connection.fileno())
            self._fail("its scheduler process died")
            return
        if isinstance(answer, Broken):
            self._fail(answer.cause)
        else:
            waiting = self._answers.pop(answer.key)
            if not waiting.cancelled():  # else the engine has failed meanwhile
                waiting.set_result(answer)

    def fail(self, cause: str) -> None:
        """Have all that is and will be captured fail. From any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fail, cause)

    def _fail(self, cause: str) -> None:
        if not self._broken.done():
            self._broken.set_result(cause)

    def _on_child_death(self, _signal: int, _frame: FrameType | None) -> None:
        """SGLang's processes, and its watch over them, send SIGQUIT when one is lost."""
        if not self._loop.is_closed():
            fail = partial(self._fail, "one of its processes died")
            self._loop.call_soon_threadsafe(self._loop.call_later, _LAST_WORDS_S, fail)


class SglPart:
    """Another node's part of an engine: it computes with the first one, which answers."""

    def __init__(self, aux_layer_ids: Sequence[int], arguments: Mapping[str, Any]) -> None:
        """Start SGLang's processes of this node, once all the parts have met.

        Raises:
            EngineError: SGLang didn't start, or can't capture from this target.
            ConfigError: SGLang doesn't know an argument, or refuses its value.
        """
        check_version()
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        settings = CaptureSettings(tuple(aux_layer_ids), None, theirs)
        self._engine = launch(settings, arguments, self._connection)

    def wait(self) -> None:
        """Return when one of its processes has ended: the whole engine is lost then."""
        wait([process.sentinel for process in multiprocessing.active_children()])
