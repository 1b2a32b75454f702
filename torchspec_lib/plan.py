"""The cluster plan: who sits where, and how much memory the store gets.

Derived from the configuration, the target and the data set alone, so that everything
knowable is refused before anything starts.
"""

import math
from typing import Literal

from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import Settings
from torchspec_lib.errors import ConfigError
from torchspec_lib.target import TargetSpec, aux_layer_ids

MIB = 1 << 20
SEGMENT_STEP_BYTES = 16 * MIB
MIN_SEGMENT_BYTES = 64 * MIB
SEGMENT_SLACK = 1.35
"""The store allocates in bins of 1/8 power of two (1.125) and fragments (1 / 0.85)."""
SAMPLE_OVERHEAD_BYTES = 4096
"""Header, table, trailer and alignment of a packed sample, at most."""
MIN_SAMPLE_TOKENS = 32
"""An engine's self-check stores as many."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Role = Literal["training", "inference", "decoding"]


class Bundle(Settings):
    """Resources of one actor, or in colocation of those that share them.

    ``decoding`` is the decoder's of snapshots.
    """

    roles: tuple[Role, ...]
    num_cpus: int
    num_gpus: int


class ClusterPlan(Settings):
    """What a run needs and where it goes; ``provision_cluster``'s output."""

    device: Literal["cuda", "cpu"]
    placement: Literal["separate", "colocate", "debug_train_only", "debug_inference_only"]
    training_bundles: tuple[Bundle, ...]
    inference_bundles: tuple[Bundle, ...]
    """Empty in colocation, where the training bundles hold the engines too."""
    decoding_bundles: tuple[Bundle, ...] = ()
    """One where snapshots are decoded; in colocation the first training bundle holds that too."""
    training_num_nodes: int
    inference_num_nodes: int
    num_engines: int
    num_steps: int
    bytes_per_token: int
    sample_bytes: int
    """The longest sample."""
    max_in_flight_bytes: int
    segment_bytes: int
    weight_bytes: int
    """The target's parameters, in its dtype."""

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        return self.training_bundles + self.inference_bundles + self.decoding_bundles

    @property
    def num_gpus(self) -> int:
        return sum(bundle.num_gpus for bundle in self.bundles)

    def owned_bytes(self, num_owners: int) -> int:
        """What each of the store's owners lends: its share, and room for some samples at least."""
        share = max(self.segment_bytes // num_owners, 3 * self.sample_bytes)
        return math.ceil(share / SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES

    def reserved_bytes(self, num_tokens: int) -> int:
        """Upper bound of a packed sample's size."""
        return num_tokens * self.bytes_per_token + SAMPLE_OVERHEAD_BYTES


def make_plan(run: RunConfig, target: TargetSpec, num_prompts: int, longest: int) -> ClusterPlan:
    """Plan a run over ``num_prompts`` prompts of at most ``longest`` tokens.

    Raises:
        ConfigError: A setting doesn't fit the target, or the budget can't hold one batch.
    """
    layer_ids = aux_layer_ids(run.draft, target)
    if run.inference.engine == "sglang" and layer_ids[-1] == target.num_layers - 1:
        raise ConfigError(
            "draft.aux_layer_ids",
            f"SGLang can't capture the output of the last layer, {layer_ids[-1]}, before the norm",
            "Use a lower layer, or inference.engine hf",
        )
    num_states = len(layer_ids) + 1
    mask_and_id_bytes = 1 + 4
    bytes_per_token = (
        num_states * target.hidden_size * DTYPE_BYTES[run.model.dtype] + mask_and_id_bytes
    )
    sample_bytes = max(longest, MIN_SAMPLE_TOKENS) * bytes_per_token + SAMPLE_OVERHEAD_BYTES
    in_flight, segment = _budgets(run, sample_bytes)
    training, inference = bundles_of(run)
    batch = run.training.global_batch_size
    return ClusterPlan(
        device=run.cluster.device,
        placement=run.cluster.placement,
        training_bundles=training,
        inference_bundles=inference,
        decoding_bundles=decoding_bundles_of(run),
        training_num_nodes=run.training.training_num_nodes if training else 0,
        inference_num_nodes=_num_inference_nodes(run) if inference else 0,
        num_engines=run.inference.num_engines,
        num_steps=math.ceil(num_prompts * run.training.num_epochs / batch),
        bytes_per_token=bytes_per_token,
        sample_bytes=sample_bytes,
        max_in_flight_bytes=in_flight,
        segment_bytes=segment,
        weight_bytes=_num_parameters(target) * DTYPE_BYTES[run.model.dtype],
    )


def _budgets(run: RunConfig, sample_bytes: int) -> tuple[int, int]:
    """Bytes that may be in flight, and the store's segment that holds them."""
    transfer, batch = run.transfer, run.training.global_batch_size
    needed = batch * sample_bytes
    working = run.inference.num_engines * run.inference.request_size * sample_bytes
    if transfer.max_in_flight_bytes is not None:
        in_flight = transfer.max_in_flight_bytes
    elif transfer.segment_bytes is not None:
        in_flight = int(transfer.segment_bytes / SEGMENT_SLACK)
    else:
        in_flight = 2 * needed + working
    if in_flight < needed:
        key = "max_in_flight_bytes" if transfer.max_in_flight_bytes else "segment_bytes"
        raise ConfigError(
            f"transfer.{key}",
            f"{in_flight:,} bytes in flight can't hold a global batch of {batch} samples of "
            f"up to {sample_bytes:,} bytes ({needed:,} bytes): the trainers would wait for ever",
            "Raise it, leave it out, or lower training.global_batch_size or data.max_length",
        )
    if transfer.segment_bytes is not None:
        segment = transfer.segment_bytes
        if segment < in_flight * SEGMENT_SLACK * 0.99:
            raise ConfigError(
                "transfer.segment_bytes",
                f"{segment:,} bytes are too few for {in_flight:,} bytes in flight",
                f"Use at least {math.ceil(in_flight * SEGMENT_SLACK):,}, or leave it out",
            )
        return in_flight, segment
    steps = math.ceil(in_flight * SEGMENT_SLACK / SEGMENT_STEP_BYTES)
    return in_flight, max(MIN_SEGMENT_BYTES, steps * SEGMENT_STEP_BYTES)


def bundles_of(run: RunConfig) -> tuple[tuple[Bundle, ...], tuple[Bundle, ...]]:
    """Bundles for training, and for inference: those of an engine over several nodes in a row.

    Raises:
        ConfigError: Engines of several GPUs are to share them with trainers.
    """
    placement, on_gpu, engines = run.cluster.placement, run.cluster.device == "cuda", run.inference
    if placement == "colocate":
        if engines.num_gpus_per_engine > 1:
            raise ConfigError(
                "cluster.placement",
                f"'colocate' puts an engine on every GPU, not one on {engines.num_gpus_per_engine}",
                "Use 'separate', or leave out inference.sglang.tp_size and nnodes",
            )
        shared = Bundle(roles=("training", "inference"), num_cpus=2, num_gpus=int(on_gpu))
        bundles = [shared] * run.training.world_size
        if run.snapshots.interval_steps is not None:
            roles = (*shared.roles, "decoding")
            bundles[0] = Bundle(roles=roles, num_cpus=3, num_gpus=shared.num_gpus)
        return tuple(bundles), ()
    trainer = Bundle(roles=("training",), num_cpus=1, num_gpus=int(on_gpu))
    num_parts = engines.num_nodes_per_engine
    size = engines.num_gpus_per_engine // num_parts
    engine = Bundle(roles=("inference",), num_cpus=size, num_gpus=size * int(on_gpu))
    training = (trainer,) * run.training.world_size
    inference = (engine,) * (engines.num_engines * num_parts)
    if placement == "debug_train_only":
        return training, ()
    if placement == "debug_inference_only":
        return (), inference
    return training, inference


def decoding_bundles_of(run: RunConfig) -> tuple[Bundle, ...]:
    """The bundle of the snapshots' decoder, if it has one of its own."""
    if run.snapshots.interval_steps is None or run.cluster.placement != "separate":
        return ()
    on_gpu = run.cluster.device == "cuda"
    return (Bundle(roles=("decoding",), num_cpus=1, num_gpus=int(on_gpu)),)


def _num_inference_nodes(run: RunConfig) -> int:
    """Nodes that the engines need, if each holds as many of them as its GPUs allow."""
    engines = run.inference
    if engines.num_nodes_per_engine > 1:
        return engines.num_engines * engines.num_nodes_per_engine
    per_node = engines.inference_num_gpus_per_node // engines.num_gpus_per_engine
    return math.ceil(engines.num_engines / per_node)


def _num_parameters(target: TargetSpec) -> int:
    """Parameters of a dense Llama-style decoder; an estimate for anything else."""
    hidden, heads = target.hidden_size, target.num_attention_heads * target.head_dim
    kv_heads = target.num_key_value_heads * target.head_dim
    layer = 2 * hidden * (heads + kv_heads) + 3 * hidden * target.intermediate_size
    embeddings = (1 if target.tie_word_embeddings else 2) * target.vocab_size * hidden
    return target.num_layers * layer + embeddings
