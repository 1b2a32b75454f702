"""The engines, the store, and where everything runs."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from torchspec_lib.config.settings import Fraction, Settings

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


SGLANG_INDIFFERENT = frozenset(
    {
        *("attention_backend", "prefill_attention_backend", "decode_attention_backend"),
        *("sampling_backend", "mem_fraction_static", "max_running_requests", "max_total_tokens"),
        *("log_level", "watchdog_timeout", "page_size", "schedule_policy", "cuda_graph_max_bs"),
    }
)
"""Arguments of SGLang that change no answer and no state beyond rounding."""


class SglangConfig(Settings):
    """Where SGLang's engines run, and how. For ``engine: sglang`` of inference or evaluation."""

    tp_size: PositiveInt | None = None
    """GPUs of one replica, over all its nodes. All of ``nnodes`` nodes' if that is above 1,
    else 1."""
    nnodes: PositiveInt = 1
    """Nodes of one replica."""
    dist_init_addr: Annotated[str, Field(pattern=r"^\S+:\d+$")] | None = None
    """``ip:port`` where the nodes of a replica meet, on the first of them by address. Negotiated
    if left out."""
    dist_timeout: PositiveInt = 60
    """Seconds for the ranks of a replica to meet."""
    prefill_tokens: PositiveInt = 16384
    """Tokens of a forward at most; a longer prompt is run in pieces."""
    extra_args: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Passed to SGLang as they are, such as ``attention_backend``."""

    @property
    def decisive_args(self) -> dict[str, bool | int | float | str]:
        """Of ``extra_args`` those that may change what the target says, such as a quantization."""
        return {k: v for k, v in self.extra_args.items() if k not in SGLANG_INDIFFERENT}

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
    """GPUs of a node that engines may take."""
    request_size: PositiveInt = 4
    """An engine has twice as many prompts at a time, or fewer where they are long."""
    max_attempts: PositiveInt = 3
    """Captures of a prompt that are tried before it is rejected."""
    max_failed_fraction: Fraction = 0.05
    """Share of rejected prompts above which the run ends with an error."""

    @property
    def decisive_settings(self) -> dict[str, Any]:
        """What the target's answers and states depend on; JSON-able."""
        args = self.sglang.decisive_args if self.engine == "sglang" else {}
        return {"engine": self.engine} | ({"sglang": args} if args else {})

    @property
    def num_gpus_per_engine(self) -> int:
        """GPUs of one engine, over all its nodes."""
        if self.engine == "hf":
            return 1
        nnodes = self.sglang.nnodes
        whole_nodes = nnodes * self.inference_num_gpus_per_node if nnodes > 1 else 1
        return self.sglang.tp_size or whole_nodes

    @property
    def num_calls(self) -> int:
        """Calls that an engine has at a time: in line at ``hf``, side by side at ``sglang``."""
        return 2 if self.engine == "hf" else 8

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
    """How bytes travel between nodes."""
    device_name: str = ""
    """RDMA devices, comma-separated. Required for ``rdma``."""
    segment_bytes: PositiveInt | None = None
    """Memory of the store, of all nodes together. Derived from the longest sample and the batch
    if left out."""
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
    """What engines and trainers compute on. With ``cpu``, a core stands for each GPU."""
    placement: Literal["separate", "colocate", "debug_train_only", "debug_inference_only"] = (
        "separate"
    )
    """``separate``: own bundles for training and inference. ``colocate``: one shared group, each
    GPU holds a trainer and an engine. ``debug_*``: one side alone, for
    tests; the pipeline refuses it."""
    gpu_wait_s: PositiveFloat = 300.0
    """How long to wait for GPUs that the cluster doesn't show yet."""
    queue: str | None = None
    """A Kueue queue that admits all pods of a training on Kubernetes together, or none."""
