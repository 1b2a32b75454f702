"""Evaluation of a draft, the gate and the registry."""

import re
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from torchspec_lib.config.settings import Settings

Name = Annotated[str, Field(pattern=r"^\w[\w .-]*$")]
"""What MLflow and its searches take."""

HELDOUT = "heldout"
"""What the prompts of ``data.heldout`` are called among the named sets."""


class EvaluationConfig(Settings):
    """Real speculative decoding of held-out prompts, with chains or trees."""

    engine: Literal["hf", "sglang"] = "hf"
    """``hf``: a plain loop around transformers, which knows every token and the cost of a step.
    ``sglang``: SGLang itself, run as ``inference.sglang`` says; needs a GPU."""
    draft_steps: PositiveInt = 5
    """Tokens that the draft proposes one behind the other (SGLang's ``speculative_num_steps``)."""
    draft_topk: PositiveInt = 1
    """Above 1, EAGLE-2's trees instead of chains: so many branches are followed at each step, and
    so many tokens tried behind each (SGLang's ``speculative_eagle_topk``)."""
    num_draft_tokens: PositiveInt | None = None
    """Rows that a target forward verifies: one, and the proposed tokens (SGLang's
    ``speculative_num_draft_tokens``). ``draft_steps + 1`` for chains; trees need it."""
    max_new_tokens: PositiveInt = 128
    """Of an answer."""
    max_prompts: PositiveInt | None = None
    """Of the held-out prompts and of every set, the first so many. All if left out."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy. Above, plain and speculative decoding draw with the same random numbers, so
    that their answers can still be compared token by token."""
    sets: dict[Name, str] = Field(default_factory=dict)
    """Further prompts by name, such as ``mt_bench: question.jsonl``: a source like those of
    ``data.heldout``, answers not needed, or rows with ``turns``, whose first is asked. Reported by
    set and by the rows' ``category``; the gate looks at the held-out prompts only."""

    @property
    def num_rows(self) -> int:
        """That a target forward verifies."""
        return self.num_draft_tokens or self.draft_steps + 1

    @model_validator(mode="after")
    def _tree_can_be_grown(self) -> Self:
        steps, topk, rows = self.draft_steps, self.draft_topk, self.num_draft_tokens
        if topk > 1 and rows is None:
            raise ValueError(f"draft_topk ({topk}) makes trees: set num_draft_tokens too")
        if topk == 1 and rows not in (None, steps + 1):
            raise ValueError(
                f"num_draft_tokens ({rows}) must be draft_steps + 1 ({steps + 1}) for chains: "
                "leave it out, or raise draft_topk"
            )
        most = 1 + topk + (steps - 1) * topk * topk
        if not 1 < self.num_rows <= most:
            raise ValueError(
                f"num_draft_tokens ({rows}) must be from 2 to {most}, which is all that "
                f"draft_steps ({steps}) and draft_topk ({topk}) try"
            )
        return self

    @model_validator(mode="after")
    def _answers_can_be_compared(self) -> Self:
        if self.engine == "sglang" and self.temperature:
            raise ValueError(
                f"temperature ({self.temperature:g}) must be 0 with engine 'sglang': SGLang draws "
                "other random numbers with a draft than without, so answers can't be compared"
            )
        return self

    @field_validator("sets")
    @classmethod
    def _names_are_new(cls, sets: dict[str, str]) -> dict[str, str]:
        if HELDOUT in sets:
            raise ValueError(f"a set can't be called {HELDOUT!r}, which is data.heldout: rename it")
        return sets


class RegistryConfig(Settings):
    """The gate, and where drafts are registered."""

    model_name: Name = "eagle3-draft"
    """What drafts for this target are versions of."""
    tracking_uri: str | None = None
    """An MLflow tracking URI. An SQLite file under ``data_root`` if left out."""
    min_accept_length: Annotated[float, Field(ge=1.0)] = 1.0
    """A draft below this is not registered."""
    only_better: bool = False
    """Register a draft only if it beats the champion; otherwise every one that passes."""
    prompts_until: datetime | None = None
    """Noted with a version, for the next night to go on from. The nightly workflow sets it."""
    push_to_hub: str | None = None
    """A Hugging Face repository, such as ``me/qwen3-8b-eagle3``, that gets the files and the model
    card of every draft that becomes the champion. Needs a token that may write."""
    push_private: bool = True
    """Whether a repository that isn't there yet is made private. Others stay what they are."""
    push_dry_run: bool = False
    """Say what would be pushed, and send nothing."""

    @model_validator(mode="after")
    def _pushes_somewhere(self) -> Self:
        if self.push_to_hub is None:
            if self.push_dry_run or not self.push_private:
                raise ValueError("push_private and push_dry_run do nothing without push_to_hub")
        elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.push_to_hub, re.ASCII):
            raise ValueError(
                f"push_to_hub ({self.push_to_hub!r}) must be owner/name, such as me/qwen3-8b-eagle3"
            )
        return self

    @field_validator("prompts_until")
    @classmethod
    def _is_a_moment(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"prompts_until ({value}) must have a time zone, such as +00:00")
        return value
