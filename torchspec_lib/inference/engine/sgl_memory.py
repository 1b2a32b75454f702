"""How SGLang and a trainer rank share a GPU."""

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import ConfigError
from torchspec_lib.inference.engine.checks import weight_bytes
from torchspec_lib.plan import DTYPE_BYTES
from torchspec_lib.target import TargetSpec, aux_layer_ids

GIB = 1 << 30
PROCESS_BYTES = 2 * GIB
"""CUDA's context, kernels and libraries of the engine's two processes and the trainer: half a GiB
each on an H200, and the kernels."""
_SLACK, _LIBRARY_BYTES = 1.1, GIB // 2
"""Room that SGLang counts as used by its weights, beside them: padding, and libraries' own."""


def colocated_fraction(
    run: RunConfig, target: TargetSpec, max_total_tokens: int, gpu_bytes: int, free_bytes: int
) -> float:
    """Share of a GPU's free memory for SGLang's weights and cache beside a trainer rank.

    Its weights and its cache get what they need and no more; forwards, captured states, the
    trainer and a decoder of snapshots take the rest.

    Args:
        run: The run's configuration.
        target: The target model.
        max_total_tokens: Of SGLang's cache.
        gpu_bytes: The GPU's memory.
        free_bytes: What is free of it now. An engine that is started again finds its trainer.

    Raises:
        ConfigError: They don't fit.
    """
    static = _LIBRARY_BYTES + _SLACK * (
        weight_bytes(target) + max_total_tokens * _cache_bytes_per_token(run, target)
    )
    forward = _forward_bytes(run, target)
    trainer = trainer_bytes(run, target)
    decoder = 0.0 if run.snapshots.interval_steps is None else _SLACK * weight_bytes(target)
    needed = static + forward + trainer + decoder + PROCESS_BYTES
    if needed > gpu_bytes:
        raise ConfigError(
            "cluster.placement",
            f"'colocate' needs {needed / GIB:.0f} GiB of a GPU with {gpu_bytes / GIB:.0f}: "
            f"{static / GIB:.0f} for SGLang's weights and cache, {forward / GIB:.0f} for its "
            f"forwards, {trainer / GIB:.0f} for the trainer"
            + (f", {decoder / GIB:.0f} for the decoder of snapshots" if decoder else ""),
            "Use 'separate', or lower training.micro_batch_tokens or "
            "inference.sglang.prefill_tokens"
            + (", or leave out snapshots.interval_steps" if decoder else ""),
        )
    return static / free_bytes


def trainer_bytes(run: RunConfig, target: TargetSpec) -> float:
    """What a trainer rank needs, at most: an estimate from the draft's shapes.

    Parameters, gradients and two moments in float32 are shared by the ranks; the copy that
    computes and the target's embedding and head are not. A token keeps some 24 vectors of the
    hidden size, 4 of the intermediate size and its logits for each depth.
    """
    hidden, ranks = target.hidden_size, run.training.world_size
    vocab = run.draft.vocab_size or target.vocab_size
    intermediate = run.draft.intermediate_size or target.intermediate_size
    queries = target.num_attention_heads * target.head_dim
    keys = target.num_key_value_heads * target.head_dim
    num_aux = len(aux_layer_ids(run.draft, target))
    draft = (
        num_aux * hidden * hidden
        + 2 * hidden * (queries + 2 * keys)
        + hidden * queries
        + 3 * hidden * intermediate
        + vocab * hidden
    )
    frozen = 2 * target.vocab_size * hidden * DTYPE_BYTES[run.model.dtype]
    per_depth = DTYPE_BYTES[run.training.compute_dtype] * (24 * hidden + 4 * intermediate)
    kept = run.training.micro_batch_tokens * run.draft.ttt_steps * (per_depth + 6 * vocab)
    return draft * (16 / ranks + 4) + frozen + kept


def _cache_bytes_per_token(run: RunConfig, target: TargetSpec) -> int:
    keys = target.num_key_value_heads * target.head_dim
    return 2 * target.num_layers * keys * DTYPE_BYTES[run.model.dtype]


def _forward_bytes(run: RunConfig, target: TargetSpec) -> int:
    """What a forward and its states need, with those of the forward before."""
    num_states = len(aux_layer_ids(run.draft, target)) + 1
    num_tokens = run.inference.sglang.prefill_tokens
    layer = 8 * target.hidden_size + 4 * target.intermediate_size
    states = 3 * num_states * target.hidden_size  # as computed, packed, and on their way
    return num_tokens * (states + layer) * DTYPE_BYTES[run.model.dtype]
