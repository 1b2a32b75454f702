"""Answers by SGLang, which batches them as it likes."""

from collections.abc import Sequence
from typing import Any

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import EngineError
from torchspec_lib.inference.engine.sgl_arguments import generation_arguments
from torchspec_lib.inference.engine.sgl_launch import launch_plain, shut_down
from torchspec_lib.regeneration.generator import Generated, GenerationRequest
from torchspec_lib.target import TargetSpec


class SglGenerator:
    """An SGLang engine of one node.

    Above temperature 0 it draws by the requests' seeds only with
    ``inference.sglang.extra_args: {enable_deterministic_inference: true}``, which needs a GPU;
    otherwise a second time gives other answers. Greedy ones differ where rounding turns a close
    choice.
    """

    def __init__(self, run: RunConfig, target: TargetSpec) -> None:
        """Start SGLang, from the process's main thread, before transformers is imported.

        Raises:
            EngineError: SGLang didn't start.
            ConfigError: SGLang doesn't know an argument, or refuses its value.
            DependencyError: SGLang isn't installed.
        """
        settings = run.regeneration
        self._sampling = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "stop_token_ids": list(target.eos_token_ids),
        }
        self._engine: Any = launch_plain(generation_arguments(run, target))

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generated]:
        """Continue every prompt: one result each, in order. SGLang ends us with its processes.

        Raises:
            EngineError: It gave up.
        """
        replies = self._engine.generate(
            input_ids=[request.token_ids for request in requests],
            sampling_params=[
                {
                    **self._sampling,
                    "max_new_tokens": request.max_new_tokens,
                    "sampling_seed": request.seed,
                }
                for request in requests
            ],
        )
        return [_generated(reply) for reply in replies]

    def close(self) -> None:
        """End SGLang's processes. Safe to call twice."""
        if self._engine is not None:
            shut_down(self._engine)
            self._engine = None


def _generated(reply: Any) -> Generated:
    finish = reply["meta_info"]["finish_reason"]
    if finish["type"] == "abort":
        raise EngineError("sglang", f"it gave up: {finish}")
    return Generated(list(reply["output_ids"]), finish["type"] == "stop")
