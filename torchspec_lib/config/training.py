"""Optimizer steps, and what happens when a part of a run is lost."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from torchspec_lib.config.settings import Fraction, Settings, find_path

LossName = Literal["kl", "tv", "lk_alpha", "lk_hybrid"]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
FORWARD_KL: dict[LossName, float] = {"kl": 1.0}


class TrainingConfig(Settings):
    """What an optimizer step is, and how many there are."""

    training_num_nodes: PositiveInt = 1
    """Nodes that hold trainers."""
    training_num_gpus_per_node: PositiveInt = 1
    """Trainer ranks per node; each has one GPU, or with ``cluster.device: cpu`` one core."""
    num_epochs: PositiveInt = 1
    """Passes over the training prompts, each in an order of its own."""
    global_batch_size: PositiveInt = 16
    """Samples per optimizer step over all ranks."""
    micro_batch_tokens: PositiveInt = 16384
    """Samples of a rank are packed into micro-batches of at most so many tokens."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """``muon``: Muon for the draft's inner matrices, AdamW for its head and norms. It gets further
    in as many steps; each costs more than AdamW's, which large global batches hide."""
    learning_rate: PositiveFloat = 1e-4
    """The highest, which the warm-up leads to. The same for both optimizers."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Where the schedule leads to in the end."""
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """What follows the warm-up: half a cosine, a line, nothing, or ``wsd`` (stable, then decay)."""
    warmup_ratio: Fraction = 0.015
    """Share of all steps in which the learning rate rises from zero."""
    decay_ratio: Fraction = 0.2
    """Share of all steps in which it falls at the end, in a line. For ``wsd``."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled from the gradient, for both optimizers."""
    max_grad_norm: PositiveFloat = 0.5
    """Norm of the whole gradient that it is clipped to."""
    loss: Annotated[dict[LossName, PositiveFloat], Field(min_length=1)] = Field(
        default_factory=lambda: FORWARD_KL
    )
    """Weights of what is summed: forward KL divergence, total variation, and the two LK losses
    that aim at acceptance (arXiv 2602.23881). Forward KL alone if left out."""
    loss_reduction: Literal["token", "sample"] = "token"
    """Whether every token or every sample weighs alike."""
    depth_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Depth k of the training-time test weighs ``depth_decay ** k``."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Matrix products; parameters, softmax and gradient sums are always float32."""
    parallelism: Literal["shard", "replicate"] = "shard"
    """``shard``: ranks share parameters, gradients and optimizer state (FSDP). ``replicate``: each
    holds all of it (DDP), and gradients are all they exchange."""
    prefetch_steps: PositiveInt = 2
    """Steps whose samples a rank fetches ahead."""
    checkpoint_interval: PositiveInt = 1000
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that stay, besides the one with the best accept length."""
    continual_from: str | None = None
    """A checkpoint, an exported draft or anybody's EAGLE-3 draft (as SafeAILab, SGLang or vLLM
    have it) whose weights the draft starts from. Weights alone: optimizer, schedule and accounts
    start anew."""
    continual_vocab: Literal["keep", "remap"] = "keep"
    """``keep``: a pruned draft vocabulary is that of the draft in ``continual_from``. ``remap``:
    it is the run's own; the head's rows of shared tokens are taken over, those of new tokens start
    as the target's."""

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
    def _schedule_fits(self) -> Self:
        if self.lr_schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1.0:
            raise ValueError(
                f"warmup_ratio ({self.warmup_ratio}) and decay_ratio ({self.decay_ratio}) must "
                "not exceed all steps together"
            )
        usual = type(self).model_fields["decay_ratio"].default
        if self.lr_schedule != "wsd" and self.decay_ratio != usual:
            raise ValueError(
                f"decay_ratio is for lr_schedule 'wsd' and does nothing with {self.lr_schedule!r}: "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _remaps_something(self) -> Self:
        if self.continual_vocab == "remap" and self.continual_from is None:
            raise ValueError("continual_vocab does nothing without continual_from: leave it out")
        return self

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate}) must not exceed "
                f"learning_rate ({self.learning_rate})"
            )
        return self


class SnapshotConfig(Settings):
    """Real decoding while the training goes on, to export the best draft and not the last."""

    interval_steps: PositiveInt | None = None
    """Steps between snapshots of the draft that are decoded, greedily, with ``evaluation``'s
    ``draft_steps`` and ``max_new_tokens``. The one with the longest accept length is exported;
    left out, the last step's draft is. The decoder holds the target once more: on a GPU of its
    own, or colocated on that of trainer rank 0. A snapshot that comes while it is busy waits, and
    is left out when the next one comes: choose an interval long enough that none is, or a rerun
    may export another draft."""
    num_prompts: PositiveInt = 16
    """Training prompts set aside to be decoded, chosen by the seed: nothing is trained on them,
    and the final evaluation's are others."""
    patience: PositiveInt | None = None
    """The training ends after so many snapshots in a row that aren't better than the best."""

    @property
    def num_set_aside(self) -> int:
        """Prompts that nothing is trained on."""
        return 0 if self.interval_steps is None else self.num_prompts

    @model_validator(mode="after")
    def _is_on(self) -> Self:
        usual = type(self).model_fields["num_prompts"].default
        if self.interval_steps is None and (self.patience or self.num_prompts != usual):
            raise ValueError("num_prompts and patience do nothing without interval_steps: set it")
        return self


class RecoveryConfig(Settings):
    """What happens when a part of a run dies or hangs. Changes nothing of what is trained."""

    max_restarts: NonNegativeInt = 5
    """Restarts of the same part in a row, without progress in between."""
    hang_timeout_s: PositiveFloat = 300.0
    """A part that gets nowhere for so long is ended and started again. Must be longer than any
    step, than an engine takes for ``inference.request_size`` prompts, and than the storage takes
    for a checkpoint."""
    grace_s: PositiveFloat = 25.0
    """For saving a checkpoint when the run is interrupted by SIGTERM or Ctrl-C."""
    on_damaged_checkpoint: Literal["fail", "use_older"] = "fail"
    """``use_older`` sets damaged checkpoints aside and resumes from the newest whole one."""
