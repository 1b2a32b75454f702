"""The target, the conversations, and the draft's shape."""

from typing import Annotated, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from torchspec_lib.config.settings import DType, Settings

TEMPLATE_NAMES = frozenset(
    {
        *("messages", "tools", "documents", "conversations", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
        *("strftime_now", "bos_token", "eos_token", "pad_token", "unk_token"),
    }
)
"""What a chat template is given anyway."""


def _is_plain(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("must be true, false, a number or a text")
    return value


TemplateValue = Annotated[bool | int | float | str, BeforeValidator(_is_plain)]


class ModelConfig(Settings):
    """The frozen target model."""

    target: str
    """A Hugging Face model id, or a folder with ``config.json`` and safetensors."""
    dtype: DType = "bfloat16"
    """What the target runs in, its states travel in and the draft is exported in."""
    trust_remote_code: bool = False
    """Run the code that comes with the target."""


class DataConfig(Settings):
    """Conversations, and how they become prompts."""

    train: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files (.json, .jsonl, .parquet) or Hugging Face data set ids, read in this order; for
    ``train_nightly`` also folders with such files."""
    heldout: Annotated[tuple[str, ...], Field(min_length=1)]
    """Conversations for evaluation, asked up to their last answer. What begins with the same user
    message is left out of training."""
    split: str = "train"
    """Which split of a Hugging Face data set to read."""
    max_length: PositiveInt = 4096
    """Longest conversation in tokens; longer ones are filtered out and counted."""
    min_loss_tokens: PositiveInt = 4
    """Fewest supervised tokens of a conversation worth training on."""
    max_prompts: PositiveInt | None = None
    """Train on the first so many usable conversations only. All if left out."""
    last_turn_only: bool = False
    """Supervise only what follows the last user message: for reasoning models, whose templates
    drop the reasoning of earlier turns."""
    chat_template_kwargs: dict[str, TemplateValue] = Field(default_factory=dict)
    """What the target is served with, such as ``enable_thinking: false``; its chat template sees
    these names."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _own_names_stay(cls, given: dict[str, TemplateValue]) -> dict[str, TemplateValue]:
        if taken := sorted(TEMPLATE_NAMES & given.keys()):
            raise ValueError(
                f"can't set {', '.join(taken)}: the conversation and the tokenizer do. Remove it"
            )
        return given


class DraftConfig(Settings):
    """The draft's shape. What is left out follows the target."""

    aux_layer_ids: tuple[NonNegativeInt, ...] | None = None
    """Target layers (output of layer L, from 0) that the draft reads, ascending. 1,
    N // 2 - 1 and N - 4 of N layers if left out."""
    vocab_size: PositiveInt | None = None
    """Draft vocabulary: the most frequent supervised tokens. All of the target's if left out."""
    intermediate_size: PositiveInt | None = None
    """Width of the draft's MLP. The target's if left out."""
    ttt_steps: PositiveInt = 7
    """Depth of the training-time test."""
    fc_norm: bool = True
    """EAGLE-3.1: normalise every auxiliary state before they are joined."""
    norm_output: bool = True
    """EAGLE-3.1: the next depth reads the draft's state after the final norm. Without both it is
    EAGLE-3 as published; SGLang and vLLM serve either."""
    freeze_head: bool = False
    """Keep the target's own rows as the draft's head, whatever ``training.continual_from`` brings.
    It isn't trained then, and takes no memory for gradients and optimizer state."""

    @model_validator(mode="after")
    def _aux_layers_ascend(self) -> Self:
        ids = self.aux_layer_ids
        if ids is not None and (not ids or list(ids) != sorted(set(ids))):
            raise ValueError(f"aux_layer_ids must be unique and ascending, not {list(ids)}")
        return self
