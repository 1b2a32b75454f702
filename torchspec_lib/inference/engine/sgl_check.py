"""Does SGLang capture what this target computes? Checked when an engine starts."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torchspec_lib.errors import EngineError
from torchspec_lib.inference.engine.base import SelfCheck
from torchspec_lib.inference.engine.checks import MAX_LOGIT_ERROR, probe_prompt, weight_bytes
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.models.target_model import captured_outputs, decoder_parts, load_target
from torchspec_lib.target import TargetSpec
from torchspec_lib.types import Prompt

logger = logging.getLogger(__name__)

MAX_REFERENCE_BYTES = 2 << 30
"""Weights up to which the target is also run through transformers, on the CPU."""
MAX_STATE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference of states, relative to their norm."""

Sample = Mapping[str, Tensor]


def check_capture(
    target: TargetSpec,
    aux_layer_ids: Sequence[int],
    dtype_name: str,
    trust_remote_code: bool,
    sample_of: Callable[[Prompt], Sample],
    log_probs_of: Callable[[Prompt], tuple[Tensor, Tensor]],
) -> SelfCheck:
    """Capture a prompt, and rebuild SGLang's own log-probabilities from it.

    That proves the last states. The auxiliary ones are compared with transformers', if the
    target is small enough to be loaded a second time.

    Args:
        target: The target model.
        aux_layer_ids: The layers captured.
        dtype_name: What the target runs in.
        trust_remote_code: For loading the target.
        sample_of: What a trainer reads of a prompt.
        log_probs_of: SGLang's log-probabilities [T-1] of a prompt's tokens from the second on,
            and the ids [T-1] that were likeliest there.

    Raises:
        EngineError: The states differ.
    """
    dtype: torch.dtype = getattr(torch, dtype_name)
    prompt = probe_prompt(target)
    sample = sample_of(prompt)
    num_captured = sample["aux_hidden_states"].shape[-1] // target.hidden_size
    if num_captured != len(aux_layer_ids):
        raise EngineError(
            "sglang",
            f"it captures {num_captured} of {len(aux_layer_ids)} auxiliary layers "
            f"({list(aux_layer_ids)}); the last layer's output is out of its reach",
        )
    check = _check_last(target, dtype, prompt, sample, log_probs_of)
    if weight_bytes(target) <= MAX_REFERENCE_BYTES:
        reference = TransformersReference(target, aux_layer_ids, dtype_name, trust_remote_code)
        errors = reference.compare(prompt, sample)
        logger.info("event=compared_with_transformers max_error=%.2e", max(errors))
    else:
        logger.info("event=compared_with_transformers skipped=size")
    return check


def _check_last(
    target: TargetSpec,
    dtype: torch.dtype,
    prompt: Prompt,
    sample: Sample,
    log_probs_of: Callable[[Prompt], tuple[Tensor, Tensor]],
) -> SelfCheck:
    log_probs, likeliest = log_probs_of(prompt)
    head = TargetHead.load(target, None, dtype)
    logits = head.teacher_logits(sample["last_hidden_states"][:-1]).float()
    following = torch.tensor(prompt.token_ids[1:]).long()
    rebuilt = logits.log_softmax(-1).gather(1, following[:, None])[:, 0]
    error = ((rebuilt - log_probs).abs().max() / log_probs.abs().max()).item()
    if not error <= MAX_LOGIT_ERROR[dtype]:
        raise EngineError(
            "sglang",
            f"log-probabilities rebuilt from captured states are {error:.1%} off SGLang's own: "
            "its last hidden state isn't taken after the final norm, or lm_head isn't plain",
        )
    agreement = (logits.argmax(-1) == likeliest).float().mean().item()
    return SelfCheck(prompt.num_tokens, error, agreement)


class TransformersReference:
    """The target once more, in transformers on the CPU."""

    def __init__(
        self,
        target: TargetSpec,
        aux_layer_ids: Sequence[int],
        dtype_name: str,
        trust_remote_code: bool = False,
    ) -> None:
        """Load it.

        Raises:
            EngineError: The model isn't built like a Llama.
        """
        self._model = load_target(target, dtype_name, torch.device("cpu"), trust_remote_code)
        self._decoder, layers, norm = decoder_parts(self._model)
        self._modules = [*(layers[i] for i in aux_layer_ids), norm]
        names = [type(module).__name__ for module in (self._model, layers[0], norm)]
        self.description = "{0}: {count} of {1}, then {2}".format(*names, count=len(layers))
        self.names = (*(f"layer {i}" for i in aux_layer_ids), "the final norm")
        self._max_error = MAX_STATE_ERROR[getattr(torch, dtype_name)]

    def compare(self, prompt: Prompt, sample: Sample) -> list[float]:
        """Relative differences of a sample's states, as ``names``.

        Raises:
            EngineError: One is too large.
        """
        ids_T = torch.tensor(prompt.token_ids.astype("int64"))
        with torch.inference_mode(), captured_outputs(self._modules) as states:
            self._decoder(input_ids=ids_T[None], use_cache=False)
            own = list(states)
        aux_TnH, last_TH = sample["aux_hidden_states"], sample["last_hidden_states"]
        captured = [*aux_TnH.chunk(len(own) - 1, dim=-1), last_TH]
        errors: list[float] = [
            ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
            for ours, theirs in zip(captured, own, strict=True)
        ]
        for name, error in zip(self.names, errors, strict=True):
            if not error <= self._max_error:
                raise EngineError(
                    "sglang", f"captured states of {name} are {error:.1%} off transformers'"
                )
        return errors
