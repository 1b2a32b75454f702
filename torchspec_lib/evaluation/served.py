"""Decoding by SGLang itself, with a draft and without: what serving will give.

SGLang runs in a process of its own: it changes the one it is started from, and ends with signals.
That process imports this module, and so nothing here may import transformers before SGLang is.
"""

import multiprocessing
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchspec_lib import logs
from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import ConfigError, EngineError, TorchSpecError, WorkerLostError
from torchspec_lib.evaluation.acceptance import ServedCounts
from torchspec_lib.inference.engine.sgl_arguments import generation_arguments
from torchspec_lib.inference.engine.sgl_launch import launch_plain, shut_down
from torchspec_lib.target import TargetSpec

NUM_WARM_UPS = 3
"""Prompts answered unmeasured at first: kernels are compiled for the lengths that they meet."""

_END_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """An answer of SGLang's, and what it tells of how it came about."""

    token_ids: list[int]
    counts: ServedCounts | None
    """None without a draft."""
    seconds: float


def serve(
    run: RunConfig, target: TargetSpec, draft: Path | None, prompts: Sequence[list[int]]
) -> Iterator[Served]:
    """Have a fresh SGLang answer prompts one after the other, greedily: one answer each, in order.

    Args:
        run: ``evaluation`` says how to draft, ``inference.sglang`` how to run SGLang.
        target: The target.
        draft: An exported draft, or None for plain decoding.
        prompts: Token ids.

    Raises:
        ConfigError: SGLang refuses its arguments, or a prompt with its answer is too long for it.
        DependencyError: It isn't installed.
        EngineError: It didn't start, gave up, or doesn't tell what it accepted.
        WorkerLostError: Its process died.
    """
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run, target, draft, prompts, theirs))
    process.start()
    theirs.close()  # so that reading ours ends when the process does
    title = f"SGLang with{'out a' if draft is None else ' the'} draft"
    try:
        with connection, tqdm(prompts, title, unit=" prompts", mininterval=1.0) as bar:
            for _ in bar:
                yield _receive(connection, process)
    finally:
        process.join(_END_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()


def _receive(connection: Connection, process: BaseProcess) -> Served:
    try:
        said: Served | TorchSpecError = connection.recv()
    except EOFError:
        process.join(_END_TIMEOUT_S)
        cause = f"its process ended with exit code {process.exitcode}"
        raise WorkerLostError("the SGLang of the evaluation", cause) from None
    if isinstance(said, TorchSpecError):
        raise said
    return said


def _work(
    run: RunConfig,
    target: TargetSpec,
    draft: Path | None,
    prompts: Sequence[list[int]],
    connection: Connection,
) -> None:
    """The process: answer all prompts, until nobody listens."""
    logs.setup("evaluation", 0)
    with suppress(BrokenPipeError):
        try:
            with closing(_Server(run, target, draft)) as server:
                for token_ids in prompts[:NUM_WARM_UPS]:
                    server.answer(token_ids)
                for token_ids in prompts:
                    connection.send(server.answer(token_ids))
        except TorchSpecError as error:
            connection.send(error)


class _Server:
    """A running SGLang."""

    def __init__(self, run: RunConfig, target: TargetSpec, draft: Path | None) -> None:
        self._engine: Any = launch_plain(serving_arguments(run, target, draft))
        self._with_draft, self._eos_ids = draft is not None, frozenset(target.eos_token_ids)
        self._sampling = {
            "max_new_tokens": run.evaluation.max_new_tokens,
            "temperature": 0.0,
            "stop_token_ids": list(target.eos_token_ids),
        }

    def answer(self, token_ids: list[int]) -> Served:
        start = time.perf_counter()
        try:
            reply = self._engine.generate(input_ids=token_ids, sampling_params=self._sampling)
        except ValueError as error:  # SGLang's own limits
            raise ConfigError(
                "evaluation.max_new_tokens",
                f"SGLang refuses a prompt of {len(token_ids)} tokens: {error}",
                "Lower it, or leave out the longest prompts",
            ) from error
        seconds = time.perf_counter() - start
        finish = reply["meta_info"]["finish_reason"]
        if finish["type"] == "abort":
            raise EngineError("sglang", f"it gave up: {finish}")
        new_ids = until_end(reply["output_ids"], self._eos_ids)
        counts = accepted_counts(reply["meta_info"], len(new_ids)) if self._with_draft else None
        return Served(new_ids, counts, seconds)

    def close(self) -> None:
        shut_down(self._engine)


def serving_arguments(run: RunConfig, target: TargetSpec, draft: Path | None) -> dict[str, Any]:
    """SGLang's ``ServerArgs``: as it serves, but that no prompt is cheaper the second time."""
    arguments = generation_arguments(run, target) | {
        "tp_size": run.inference.sglang.tp_size or 1,  # also where transformers captures
        "disable_radix_cache": True,
    }
    if draft is None:
        return arguments
    settings = run.evaluation
    return arguments | {
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": str(draft),
        "speculative_num_steps": settings.draft_steps,
        "speculative_eagle_topk": settings.draft_topk,
        "speculative_num_draft_tokens": settings.num_rows,
    }


def until_end(token_ids: Sequence[int], eos_ids: Collection[int]) -> list[int]:
    """Nothing behind an end-of-sequence token.

    SGLang 0.5.17 looks at the limit first: where that falls into the same verification as the end,
    what follows the end is emitted too.
    """
    end = next((i for i, token in enumerate(token_ids) if token in eos_ids), len(token_ids))
    return list(token_ids[: end + 1])


def accepted_counts(meta_info: Mapping[str, Any], num_new_tokens: int) -> ServedCounts:
    """What SGLang tells of an answer: how many verifications accepted 0, 1, ... draft tokens.

    Raises:
        EngineError: It doesn't tell, or its counts don't add up to the answer.
    """
    histogram = meta_info.get("spec_correct_drafts_histogram", [])
    accepted = tuple(a for a, count in enumerate(histogram) for _ in range(count))
    try:
        return ServedCounts(accepted, num_new_tokens)
    except ValueError as error:
        raise EngineError(
            "sglang", f"spec_correct_drafts_histogram is {histogram}, but {error}"
        ) from error
