"""The shape of a draft: what its ``config.json`` says, in the words of the serving engines."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from torchspec_lib.config.models import DraftConfig
from torchspec_lib.config.settings import DType, Settings
from torchspec_lib.errors import ConfigError
from torchspec_lib.target import TargetSpec, aux_layer_ids

ARCHITECTURE = "LlamaForCausalLMEagle3"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies don't depend on how long a sequence grows."""

_CONSTANTS: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "norm_before_residual": False,
}


class DraftModelConfig(Settings):
    """An EAGLE-3 draft: one Llama-style layer that reads the target's states."""

    hidden_size: PositiveInt
    target_hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    hidden_act: str
    rms_norm_eps: PositiveFloat
    vocab_size: PositiveInt
    """The target's."""
    draft_vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rope_parameters: dict[str, Any]
    """``rope_type``, ``rope_theta`` and the type's own fields, as transformers 5 has it."""
    aux_layer_ids: tuple[NonNegativeInt, ...]
    """Target layers (output of layer L, from 0) whose states the draft reads, ascending."""
    dtype: DType
    """Of the exported weights: the target's."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    fc_norm: bool = False
    """EAGLE-3.1: an RMSNorm for every auxiliary state, before fc."""
    norm_output: bool = False
    """EAGLE-3.1: the next depth reads the layer's output after the final norm, not before."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        ids = list(self.aux_layer_ids)
        if not ids or ids != sorted(set(ids)):
            raise ValueError(f"aux_layer_ids must be unique and ascending, not {ids}")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size ({self.draft_vocab_size}) exceeds vocab_size ({self.vocab_size})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.rope_parameters.get("rope_type") not in ROPE_TYPES:
            raise ValueError(
                f"rope_type must be one of {', '.join(ROPE_TYPES)}, "
                f"not {self.rope_parameters.get('rope_type')!r}"
            )
        if not isinstance(self.rope_parameters.get("rope_theta"), int | float):
            raise ValueError("rope_parameters must hold a number rope_theta")
        return self

    @property
    def aux_width(self) -> int:
        """Width A of the concatenated auxiliary states."""
        return len(self.aux_layer_ids) * self.target_hidden_size

    @property
    def is_pruned(self) -> bool:
        return self.draft_vocab_size < self.vocab_size

    @classmethod
    def from_target(
        cls, target: TargetSpec, draft: DraftConfig, draft_vocab_size: int, dtype: str
    ) -> Self:
        """A draft of the target's own sizes, so that it can share its embedding and head.

        Raises:
            ConfigError: The target is too shallow for the auxiliary layers, its rotary
                embedding isn't supported, or the vocabulary is larger than the target's.
        """
        _check_rope(target)
        if draft_vocab_size > target.vocab_size:
            raise ConfigError(
                "draft.vocab_size",
                f"{draft_vocab_size} tokens are more than the target's {target.vocab_size}",
                "Lower it, or leave it out",
            )
        return cls.model_validate(
            {
                "hidden_size": target.hidden_size,
                "target_hidden_size": target.hidden_size,
                "intermediate_size": draft.intermediate_size or target.intermediate_size,
                "num_attention_heads": target.num_attention_heads,
                "num_key_value_heads": target.num_key_value_heads,
                "head_dim": target.head_dim,
                "hidden_act": target.hidden_act,
                "rms_norm_eps": target.rms_norm_eps,
                "vocab_size": target.vocab_size,
                "draft_vocab_size": draft_vocab_size,
                "max_position_embeddings": target.max_position_embeddings,
                "rope_parameters": target.rope_parameters,
                "aux_layer_ids": aux_layer_ids(draft, target),
                "dtype": dtype,
                "bos_token_id": target.bos_token_id,
                "eos_token_ids": target.eos_token_ids,
                "fc_norm": draft.fc_norm,
                "norm_output": draft.norm_output,
            }
        )

    def to_serving_json(self) -> dict[str, Any]:
        """``config.json`` as SGLang, vLLM and transformers 4 and 5 read it.

        SGLang takes the ids under ``eagle_config`` for layer outputs; vLLM takes the
        top-level ids for "after so many layers", one more. Both are written.
        """
        raw = self.model_dump(exclude={"aux_layer_ids", "dtype", "eos_token_ids"})
        if self.target_hidden_size == self.hidden_size:
            del raw["target_hidden_size"]
        scaling = {k: v for k, v in self.rope_parameters.items() if k != "rope_theta"}
        ids, eos = list(self.aux_layer_ids), list(self.eos_token_ids)
        return {
            **_CONSTANTS,
            **raw,
            "rope_theta": self.rope_parameters["rope_theta"],
            "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
            "torch_dtype": self.dtype,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids},
            "eagle_aux_hidden_state_layer_ids": [i + 1 for i in ids],
        }

    @classmethod
    def from_serving_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read what ``to_serving_json`` wrote; whatever else is in it is left alone.

        Raises:
            pydantic.ValidationError: A field is missing or impossible.
        """
        own = {name: raw[name] for name in cls.model_fields if name in raw}
        own.setdefault("target_hidden_size", raw.get("hidden_size"))
        eagle = raw.get("eagle_config")
        if isinstance(eagle, Mapping):
            own["aux_layer_ids"] = eagle.get("eagle_aux_hidden_state_layer_ids")
        eos = raw.get("eos_token_id")
        own["eos_token_ids"] = eos if isinstance(eos, list) else [] if eos is None else [eos]
        own["dtype"] = raw.get("torch_dtype")
        return cls.model_validate(own)


def _check_rope(target: TargetSpec) -> None:
    rope = target.rope_parameters
    if rope.get("rope_type") not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            "model.target",
            f"its rotary embedding {rope} isn't supported for a draft",
            f"Use a target that rotates all of a head with one of: {', '.join(ROPE_TYPES)}",
        )
