"""The configuration of a run: what a user may set, its defaults, and what contradicts itself.

One ``RunConfig`` is one Flyte input, and one YAML under ``configs/``. A default stands here
and nowhere else; what can be derived from the target model is no setting (``plan.py``).
Imports neither torch nor ray.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from torchspec_lib.errors import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parents[1]

DType = Literal["float32", "bfloat16", "float16"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseModel):
    """Base of every config and report: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Settings):
    """The frozen target model."""

    target: str
    """A Hugging Face model id, or a folder with ``config.json`` and safetensors."""
    dtype: DType = "bfloat16"
    """What the target runs in, its states travel in and the draft is exported in."""
    trust_remote_code: bool = False


class DataConfig(Settings):
    """Conversations, and how they become prompts."""

    train: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files (.json, .jsonl, .parquet) or Hugging Face data set ids, read in this order."""
    heldout: Annotated[tuple[str, ...], Field(min_length=1)]
    """Conversations for evaluation. Those that also occur in ``train`` are left out of training."""
    split: str = "train"
    """Which split of a Hugging Face data set to read."""
    max_length: PositiveInt = 4096
    """Longest conversation in tokens; longer ones are filtered out and counted."""
    min_loss_tokens: PositiveInt = 4
    """Fewest supervised tokens of a conversation worth training on."""
    max_prompts: PositiveInt | None = None
    """Train on the first so many usable conversations only."""


class DraftConfig(Settings):
    """The draft's shape. What is left out follows the target."""

    aux_layer_ids: tuple[NonNegativeInt, ...] | None = None
    """Target layers (output of layer L, from 0) that the draft reads, ascending."""
    vocab_size: PositiveInt | None = None
    """Draft vocabulary: the most frequent supervised tokens. All of the target's if left out."""
    intermediate_size: PositiveInt | None = None
    ttt_steps: PositiveInt = 7
    """Depth of the training-time test."""

    @model_validator(mode="after")
    def _aux_layers_ascend(self) -> Self:
        ids = self.aux_layer_ids
        if ids is not None and (not ids or list(ids) != sorted(set(ids))):
            raise ValueError(f"aux_layer_ids must be unique and ascending, not {list(ids)}")
        return self


class TrainingConfig(Settings):
    """What an optimizer step is, and how many there are."""

    training_num_nodes: PositiveInt = 1
    training_num_gpus_per_node: PositiveInt = 1
    """Trainer ranks per node; each has one GPU, or with ``cluster.device: cpu`` one core."""
    num_epochs: PositiveInt = 1
    global_batch_size: PositiveInt = 16
    """Samples per optimizer step over all ranks."""
    micro_batch_tokens: PositiveInt = 16384
    """Samples of a rank are packed into micro-batches of at most so many tokens."""
    learning_rate: PositiveFloat = 1e-4
    min_learning_rate: NonNegativeFloat = 0.0
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.015
    """Share of all steps in which the learning rate rises from zero."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 0.5
    loss_reduction: Literal["token", "sample"] = "token"
    """Whether every token or every sample weighs alike."""
    depth_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Depth k of the training-time test weighs ``depth_decay ** k``."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Matrix products; parameters, softmax and gradient sums are always float32."""
    prefetch_steps: PositiveInt = 2
    """Steps whose samples a rank fetches ahead."""
    checkpoint_interval: PositiveInt = 1000
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that stay, besides the one with the best accept length."""
    continual_from: str | None = None
    """A checkpoint or an exported draft whose weights the draft starts from. Weights alone:
    optimizer, schedule and accounts start anew."""

    @property
    def world_size(self) -> int:
        return self.training_num_nodes * self.training_num_gpus_per_node

    @property
    def continual_path(self) -> Path:
        """Where ``continual_from`` is.

        Raises:
            ConfigError: It isn't there.
        """
        assert self.continual_from is not None, "nothing to continue"
        return find_path(self.continual_from, "training.continual_from")

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate}) must not exceed "
                f"learning_rate ({self.learning_rate})"
            )
        return self


SGLANG_OWN_ARGUMENTS = frozenset(
    {
        *("model_path", "dtype", "device", "trust_remote_code", "random_seed"),
        *("tp_size", "nnodes", "node_rank", "dist_init_addr", "dist_timeout", "nccl_port"),
        *("dp_size", "pp_size", "enable_dp_attention", "speculative_algorithm"),
        *("skip_tokenizer_init", "disable_radix_cache", "disable_cuda_graph"),
        *("disable_overlap_schedule", "enable_mixed_chunk", "chunked_prefill_size"),
        *("max_prefill_tokens", "grammar_backend", "custom_sigquit_handler"),
    }
)
"""Arguments of SGLang that capturing depends on, or that have a setting of their own."""


class SglangConfig(Settings):
    """Where SGLang's engines run, and how. For ``inference.engine: sglang`` only."""

    tp_size: PositiveInt | None = None
    """GPUs of one replica, over all its nodes. All of ``nnodes`` nodes' if that is above 1,
    else 1."""
    nnodes: PositiveInt = 1
    """Nodes of one replica."""
    dist_init_addr: str | None = None
    """``ip:port`` where the nodes of a replica meet. Negotiated if left out."""
    dist_timeout: PositiveInt = 60
    """Seconds for the ranks of a replica to meet."""
    prefill_tokens: PositiveInt = 16384
    """Tokens of a forward at most; a longer prompt is run in pieces."""
    extra_args: dict[str, bool | int | float | str] = {}
    """Passed to SGLang as they are, such as ``attention_backend``."""

    @model_validator(mode="after")
    def _own_arguments_stay(self) -> Self:
        if taken := sorted(SGLANG_OWN_ARGUMENTS & self.extra_args.keys()):
            raise ValueError(
                f"extra_args can't set {', '.join(taken)}: capturing depends on it, or it has a "
                "setting of its own. Remove it"
            )
        return self


class InferenceConfig(Settings):
    """The engines that run the target."""

    engine: Literal["hf", "sglang"] = "hf"
    """``hf``: transformers, a prompt at a time. ``sglang``: batches, and over several GPUs."""
    sglang: SglangConfig = SglangConfig()
    inference_num_gpus: PositiveInt = 1
    """GPUs of all engines together, or with ``cluster.device: cpu`` as many cores."""
    inference_num_gpus_per_node: PositiveInt = 8
    request_size: PositiveInt = 4
    """Prompts that an engine is handed at a time."""
    max_attempts: PositiveInt = 3
    """Captures of a prompt that are tried before it is rejected."""
    max_failed_fraction: Fraction = 0.05
    """Share of rejected prompts above which the run ends with an error."""

    @property
    def num_gpus_per_engine(self) -> int:
        """GPUs of one engine, over all its nodes."""
        if self.engine == "hf":
            return 1
        nnodes = self.sglang.nnodes
        whole_nodes = nnodes * self.inference_num_gpus_per_node if nnodes > 1 else 1
        return self.sglang.tp_size or whole_nodes

    @property
    def num_nodes_per_engine(self) -> int:
        return self.sglang.nnodes if self.engine == "sglang" else 1

    @property
    def num_engines(self) -> int:
        return self.inference_num_gpus // self.num_gpus_per_engine

    @model_validator(mode="after")
    def _engines_fill_their_gpus(self) -> Self:
        size, nodes = self.num_gpus_per_engine, self.num_nodes_per_engine
        if size % nodes or size // nodes > self.inference_num_gpus_per_node:
            raise ValueError(
                f"sglang.tp_size ({size}) must spread evenly over sglang.nnodes ({nodes}) of "
                f"inference_num_gpus_per_node ({self.inference_num_gpus_per_node}) GPUs"
            )
        if self.inference_num_gpus % size:
            raise ValueError(
                f"inference_num_gpus ({self.inference_num_gpus}) must be a multiple of an "
                f"engine's GPUs ({size}, from sglang.tp_size and sglang.nnodes)"
            )
        if self.sglang.dist_init_addr is not None and self.num_engines > 1:
            raise ValueError(
                f"sglang.dist_init_addr is one engine's, and there are {self.num_engines}: leave "
                "it out"
            )
        return self


class TransferConfig(Settings):
    """The Mooncake store between engines and trainers."""

    mode: Literal["client_process", "embedded"] = "client_process"
    """``client_process``: one process a node owns the memory, actors attach by shared memory.
    ``embedded``: every engine owns a segment, bytes cross processes over the network."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    device_name: str = ""
    """RDMA devices, comma-separated. Required for ``rdma``."""
    segment_bytes: PositiveInt | None = None
    """Memory of the store. Derived from the longest sample and the batch if left out."""
    max_in_flight_bytes: PositiveInt | None = None
    """Samples captured or being captured and not yet fetched. Derived from the segment."""

    @model_validator(mode="after")
    def _rdma_names_its_device(self) -> Self:
        if (self.protocol == "rdma") != bool(self.device_name):
            raise ValueError(
                "protocol 'rdma' and device_name go together: name the devices (ibv_devices lists "
                "them), or leave both out for tcp"
            )
        return self


class ClusterConfig(Settings):
    """Where the actors run. Which Ray cluster to join is RAY_ADDRESS's to say."""

    device: Literal["cuda", "cpu"] = "cuda"
    placement: Literal["separate", "colocate", "debug_train_only", "debug_inference_only"] = (
        "separate"
    )
    """``separate``: own bundles for training and inference. ``colocate``: one shared group, each
    GPU holds a trainer and an engine. ``debug_*``: one side alone, for measuring it."""
    gpu_wait_s: PositiveFloat = 300.0
    """How long to wait for GPUs that the cluster doesn't show yet."""


class RecoveryConfig(Settings):
    """What happens when a part of a run dies or hangs. Changes nothing of what is trained."""

    max_restarts: NonNegativeInt = 5
    """Restarts of the same part in a row, without progress in between."""
    hang_timeout_s: PositiveFloat = 300.0
    """A part that gets nowhere for so long is ended and started again. Must be longer than any
    step, and than an engine takes for ``inference.request_size`` prompts."""
    grace_s: PositiveFloat = 25.0
    """For saving a checkpoint when the run is interrupted by SIGTERM or Ctrl-C."""
    on_damaged_checkpoint: Literal["fail", "use_older"] = "fail"
    """``use_older`` sets damaged checkpoints aside and resumes from the newest whole one."""


class EvaluationConfig(Settings):
    """Real speculative decoding of held-out prompts: greedy, one chain."""

    draft_steps: PositiveInt = 5
    """Tokens that the draft proposes per verification."""
    max_new_tokens: PositiveInt = 128
    max_prompts: PositiveInt | None = None


class RegistryConfig(Settings):
    """The gate, and where drafts are registered."""

    model_name: str = "eagle3-draft"
    tracking_uri: str | None = None
    """An MLflow tracking URI. An SQLite file under ``data_root`` if left out."""
    min_accept_length: Annotated[float, Field(ge=1.0)] = 1.0
    """A draft below this is not registered."""


_INDIFFERENT = {
    "training_num_nodes",
    "training_num_gpus_per_node",
    "micro_batch_tokens",
    "prefetch_steps",
    "checkpoint_interval",
    "keep_checkpoints",
    "continual_from",
}
"""Training settings that change no step."""


class RunConfig(Settings):
    """Everything a run depends on."""

    model: ModelConfig
    data: DataConfig
    draft: DraftConfig = DraftConfig()
    training: TrainingConfig = TrainingConfig()
    inference: InferenceConfig = InferenceConfig()
    transfer: TransferConfig = TransferConfig()
    cluster: ClusterConfig = ClusterConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig = RegistryConfig()
    data_root: str = "torchspec-data"
    """Folder for data sets, runs and the registry; relative to where the command is given."""
    seed: NonNegativeInt = 0
    fresh: bool = False
    """Start over instead of resuming this run's last checkpoint."""

    @model_validator(mode="after")
    def _batch_feeds_every_rank(self) -> Self:
        training = self.training
        if training.global_batch_size < training.world_size:
            raise ValueError(
                f"training.global_batch_size ({training.global_batch_size}) must be at least the "
                f"number of trainer ranks ({training.world_size})"
            )
        if training.micro_batch_tokens < self.data.max_length:
            raise ValueError(
                f"training.micro_batch_tokens ({training.micro_batch_tokens}) must hold the "
                f"longest sample: raise it, or lower data.max_length ({self.data.max_length})"
            )
        if self.cluster.placement == "colocate" and (
            training.world_size != self.inference.inference_num_gpus
        ):
            raise ValueError(
                "cluster.placement 'colocate' puts a trainer and an engine on every GPU: make "
                f"inference.inference_num_gpus ({self.inference.inference_num_gpus}) equal to "
                f"training_num_nodes x training_num_gpus_per_node ({training.world_size})"
            )
        return self

    @property
    def data_path(self) -> Path:
        return Path(self.data_root).expanduser().resolve()

    def decisive_settings(self) -> dict[str, Any]:
        """The settings that a trained draft depends on; JSON-able, nested as here.

        Paths are left out, since contents count, and so is what only costs time: where things
        run, how many ranks and engines there are, how often a checkpoint is made.
        """
        return {
            "model": self.model.model_dump(mode="json", include={"dtype"}),
            "draft": self.draft.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json", exclude=_INDIFFERENT),
            "inference": self.inference.model_dump(mode="json", include={"engine"}),
            "seed": self.seed,
        }

    def training_hash(self, contents: str) -> str:
        """What a training run's result depends on, as 16 hex digits: its run id.

        ``contents`` identifies the data, the target and the weights that the draft starts from.
        """
        settings = json.dumps(self.decisive_settings(), sort_keys=True)
        return hashlib.sha256(f"{contents}\n{settings}".encode()).hexdigest()[:16]


def find_path(path: str, key: str) -> Path:
    """An existing input, looked up from the working directory, then from the project's folder.

    Raises:
        ConfigError: It is in neither. ``key`` is the setting's full path, for the message.
    """
    given = Path(path).expanduser()
    candidates = [given] if given.is_absolute() else [Path.cwd() / given, PROJECT_ROOT / given]
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    tried = " and ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise ConfigError(key, f"{path!r} doesn't exist (looked for {tried})", "Correct the path")
