"""What SGLang is started with."""

from dataclasses import dataclass
from typing import Any

from torchspec_lib.config.run import RunConfig
from torchspec_lib.target import TargetSpec

KV_CACHE_FORWARDS = 4
"""Full forwards whose keys and values fit: nothing is generated, prompts come and go."""

_ON_CPU = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.2,
}
_WATCHDOG_S = 1800


@dataclass(frozen=True, slots=True)
class Part:
    """One node's part of an engine. The first one answers, the others only compute with it."""

    node_rank: int = 0
    rendezvous: str | None = None
    """``ip:port`` where the parts meet, the same for all; None if there is one part."""


WHOLE = Part()


def generation_arguments(run: RunConfig, target: TargetSpec) -> dict[str, Any]:
    """``ServerArgs`` of an engine that answers, on one node: with prefix cache and graphs.

    On a GPU its cache of keys and values takes what memory there is.
    """
    arguments = engine_arguments(run, target, WHOLE)
    arguments |= {
        "disable_radix_cache": False,
        "disable_overlap_schedule": False,
        "sleep_on_idle": False,
    }
    if run.cluster.device != "cpu":
        arguments["disable_cuda_graph"] = False
        arguments.pop("max_total_tokens")
    return arguments | run.inference.sglang.extra_args


def engine_arguments(run: RunConfig, target: TargetSpec, part: Part) -> dict[str, Any]:
    """``ServerArgs`` of an engine, or of its part on one node.

    Nothing may spare SGLang a forward over a prompt's tokens (a prefix cache), nor run it where
    the hook isn't called (a replayed graph).
    """
    sglang = run.inference.sglang
    return {
        "model_path": target.path,
        "dtype": run.model.dtype,
        "device": run.cluster.device,
        "trust_remote_code": run.model.trust_remote_code,
        "random_seed": run.seed,
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "sleep_on_idle": True,  # else its idle loop keeps our threads from storing
        "grammar_backend": "none",
        "tp_size": run.inference.num_gpus_per_engine,
        "nnodes": sglang.nnodes,
        "node_rank": part.node_rank,
        "dist_init_addr": part.rendezvous,
        "dist_timeout": sglang.dist_timeout,
        "chunked_prefill_size": sglang.prefill_tokens,
        "max_prefill_tokens": sglang.prefill_tokens,
        "max_total_tokens": max(KV_CACHE_FORWARDS * sglang.prefill_tokens, 2 * run.data.max_length),
        "disable_custom_all_reduce": True,
        "enforce_disable_flashinfer_allreduce_fusion": True,
        "watchdog_timeout": _WATCHDOG_S,
        "log_level": "error",
        **(_ON_CPU if run.cluster.device == "cpu" else {}),
        **sglang.extra_args,
    }
