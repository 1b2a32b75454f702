"""Evaluation of a draft, the gate and the registry."""

from datetime import datetime
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator

from torchspec_lib.config.settings import Settings


class EvaluationConfig(Settings):
    """Real speculative decoding of held-out prompts, with one chain."""

    draft_steps: PositiveInt = 5
    """Tokens that the draft proposes per verification."""
    max_new_tokens: PositiveInt = 128
    max_prompts: PositiveInt | None = None
    temperature: NonNegativeFloat = 0.0
    """0 is greedy. Above, plain and speculative decoding draw with the same random numbers, so
    that their answers can still be compared token by token."""


class RegistryConfig(Settings):
    """The gate, and where drafts are registered."""

    model_name: str = "eagle3-draft"
    tracking_uri: str | None = None
    """An MLflow tracking URI. An SQLite file under ``data_root`` if left out."""
    min_accept_length: Annotated[float, Field(ge=1.0)] = 1.0
    """A draft below this is not registered."""
    only_better: bool = False
    """Register a draft only if it beats the champion; otherwise every one that passes."""
    prompts_until: datetime | None = None
    """Noted with a version, for the next night to go on from. The nightly workflow sets it."""

    @field_validator("prompts_until")
    @classmethod
    def _is_a_moment(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"prompts_until ({value}) must have a time zone, such as +00:00")
        return value
