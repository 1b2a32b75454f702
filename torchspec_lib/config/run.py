"""The configuration of a run: what a user may set, its defaults, and what contradicts itself.

One ``RunConfig`` is one Flyte input, and one YAML under ``configs/``. A default stands in its
section and nowhere else; what can be derived from the target model is no setting (``plan.py``).
Imports neither torch nor ray.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from pydantic import NonNegativeInt, model_validator

from torchspec_lib.config.inference import ClusterConfig, InferenceConfig, TransferConfig
from torchspec_lib.config.models import DataConfig, DraftConfig, ModelConfig
from torchspec_lib.config.outcome import EvaluationConfig, RegistryConfig
from torchspec_lib.config.regeneration import RegenerationConfig
from torchspec_lib.config.settings import Settings
from torchspec_lib.config.training import RecoveryConfig, SnapshotConfig, TrainingConfig

_INDIFFERENT = {
    "training_num_nodes",
    "training_num_gpus_per_node",
    "micro_batch_tokens",
    "parallelism",
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
    regeneration: RegenerationConfig = RegenerationConfig()
    draft: DraftConfig = DraftConfig()
    training: TrainingConfig = TrainingConfig()
    snapshots: SnapshotConfig = SnapshotConfig()
    inference: InferenceConfig = InferenceConfig()
    transfer: TransferConfig = TransferConfig()
    cluster: ClusterConfig = ClusterConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig = RegistryConfig()
    data_root: str = "torchspec-data"
    """Folder for data sets, runs and the registry; relative to where the command is given."""
    seed: NonNegativeInt = 0
    """Of the draft's first weights, the order of the prompts, and all that is drawn."""
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

    @model_validator(mode="after")
    def _answers_come_from_one_node(self) -> Self:
        num_nodes = self.inference.num_nodes_per_engine
        if self.regeneration.enabled and num_nodes > 1:
            raise ValueError(
                f"regeneration.enabled needs engines of one node, and inference.sglang.nnodes is "
                f"{num_nodes}: lower it, or train on answers that are there"
            )
        if self.evaluation.engine == "sglang" and self.inference.sglang.nnodes > 1:
            raise ValueError(
                "evaluation.engine 'sglang' runs on one node, and inference.sglang.nnodes is "
                f"{self.inference.sglang.nnodes}: lower it, or evaluate with 'hf'"
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
        settings: dict[str, Any] = {
            "model": self.model.model_dump(mode="json", include={"dtype"}),
            "draft": self.draft.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json", exclude=_INDIFFERENT),
            "inference": self.inference.decisive_settings,
            "seed": self.seed,
        }
        if self.snapshots.interval_steps is not None:
            decoding = self.evaluation.model_dump(include={"draft_steps", "max_new_tokens"})
            settings["snapshots"] = self.snapshots.model_dump(mode="json") | decoding
        return settings

    def training_hash(self, contents: str) -> str:
        """What a training run's result depends on, as 16 hex digits: its run id.

        ``contents`` identifies the data, the target and the weights that the draft starts from.
        """
        settings = json.dumps(self.decisive_settings(), sort_keys=True)
        return hashlib.sha256(f"{contents}\n{settings}".encode()).hexdigest()[:16]
