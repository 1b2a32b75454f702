"""Answers by the target itself."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from torchspec_lib.config.settings import Settings


class RegenerationConfig(Settings):
    """How the target answers the training prompts anew, before they are prepared.

    ``inference.engine`` does it, on one node; ``data.chat_template_kwargs`` chooses its thinking
    mode. Sampling should be what the target is served with.
    """

    enabled: bool = False
    """Replace the training conversations' answers by the target's own. Without answers of their
    own, conversations are usable only with this."""
    turns: Literal["all", "last"] = "all"
    """``all``: every user message is answered in order, each answer after the new ones before it.
    ``last``: the last one only, after the conversation as it is; ``data.last_turn_only`` trains
    on that alone. Recorded tool calls are kept in both: their results belong to them."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample among the likeliest tokens that together are so probable; 1 is all."""
    top_k: NonNegativeInt = 0
    """Sample among so many likeliest tokens; 0 is all."""
    max_new_tokens: PositiveInt = 2048
    """Of an answer. One that is longer is cut off, and its conversation rejected."""
    seed: NonNegativeInt = 0
    """Of what is drawn at a temperature above 0."""
    max_conversations: PositiveInt | None = None
    """Answer the first so many only. All if left out."""
    batch_size: PositiveInt = 16
    """Prompts in a forward, for ``inference.engine: hf``."""
    shard_size: PositiveInt = 256
    """Conversations that an engine takes at a time. They are written together, and so safe."""
