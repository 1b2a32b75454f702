"""An engine that runs the target through Hugging Face transformers, one prompt at a time.

One prompt a forward keeps a capture independent of what it happens to be batched with, so
that a resumed run sees bit for bit the same states. The fast engine is SGLang's.
"""

import logging
from collections.abc import Sequence
from typing import Self

import torch
from torch import nn

from torchspec_lib.errors import EngineError, StoreFullError, StoreUnavailableError
from torchspec_lib.inference.engine.base import SelfCheck
from torchspec_lib.inference.engine.checks import MAX_LOGIT_ERROR, probe_prompt, problem_of
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.models.target_model import captured_outputs, decoder_parts, load_target
from torchspec_lib.target import TargetSpec
from torchspec_lib.transfer.store import TensorStore
from torchspec_lib.types import (
    CaptureFailure,
    CaptureRequest,
    CaptureResult,
    Prompt,
    SampleKey,
)

logger = logging.getLogger(__name__)


class HFEngine:
    """Captures with forward hooks on the auxiliary layers and on the final norm."""

    def __init__(
        self,
        model: nn.Module,
        target: TargetSpec,
        aux_layer_ids: Sequence[int],
        store: TensorStore,
    ) -> None:
        """``model`` is the target as a causal LM, in eval mode on its device."""
        self._model, self._target, self._store = model, target, store
        self._aux_layer_ids = tuple(aux_layer_ids)
        self._decoder, self._layers, self._final_norm = decoder_parts(model)
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    @classmethod
    def load(
        cls,
        target: TargetSpec,
        aux_layer_ids: Sequence[int],
        store: TensorStore,
        dtype: str,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> Self:
        model = load_target(target, dtype, device, trust_remote_code)
        return cls(model, target, aux_layer_ids, store)

    def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        """Capture ``requests``: one result each, in order."""
        return [self._capture_one(request) for request in requests]

    def _capture_one(self, request: CaptureRequest) -> CaptureResult:
        problem = problem_of(request.prompt, self._target)
        if problem is not None:
            return CaptureFailure(request.key, problem, "prompt")
        try:
            return self._store.put(request.key, self._states(request.prompt))
        except (StoreFullError, StoreUnavailableError) as error:
            return CaptureFailure(request.key, str(error), "store")
        except torch.AcceleratorError as error:  # no later kernel of this process will run
            raise EngineError("hf", f"the device failed: {error}") from error
        except RuntimeError as error:  # torch's own: out of memory, shapes that don't fit
            logger.warning("event=forward_failed sample=%s error=%s", request.key, error)
            reason = f"the target's forward failed: {type(error).__name__}"
            return CaptureFailure(request.key, reason, "engine")

    def _states(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """What a sample holds; see ``SampleRef``."""
        ids = torch.tensor(prompt.token_ids, dtype=torch.int32)
        modules = [*(self._layers[i] for i in self._aux_layer_ids), self._final_norm]
        with torch.inference_mode(), captured_outputs(modules) as states:
            self._decoder(input_ids=ids[None].long().to(self._device), use_cache=False)
            *aux, last = states
            return {
                "input_ids": ids,
                "loss_mask": torch.tensor(prompt.loss_mask, dtype=torch.bool),
                "aux_hidden_states": torch.cat(aux, dim=-1),
                "last_hidden_states": last,
            }

    def self_check(self) -> SelfCheck:
        """Rebuild the target's logits from a captured sample, as read back from the store.

        The reference is the target's plain forward, without hooks: its logits, and the states
        it reports itself. Catches a layer off by one, a missing norm, a wrong dtype or order.

        Raises:
            EngineError: The states differ from the target's own.
        """
        prompt = probe_prompt(self._target)
        ref = self._store.put(
            SampleKey.first("self-check", 0, prompt.prompt_id), self._states(prompt)
        )
        sample = self._store.get(ref, self._device)
        self._store.release([ref.key])
        with torch.inference_mode():
            ids = torch.tensor(prompt.token_ids[None].astype("int64"), device=self._device)
            plain = self._model(input_ids=ids, output_hidden_states=True, use_cache=False)
        self._check_aux(sample["aux_hidden_states"], plain.hidden_states)
        head = TargetHead.load(self._target, None, self._dtype).to(self._device)
        rebuilt = head.teacher_logits(sample["last_hidden_states"]).float()
        logits = plain.logits[0].float()
        error = ((rebuilt - logits).abs().max() / logits.abs().max()).item()
        agreement = (rebuilt.argmax(-1) == logits.argmax(-1)).float().mean().item()
        if not error <= MAX_LOGIT_ERROR[self._dtype]:
            raise EngineError(
                "hf",
                f"logits rebuilt from captured states are {error:.1%} off the target's own: its "
                "last hidden state isn't taken after the final norm, or lm_head isn't plain",
            )
        return SelfCheck(prompt.num_tokens, error, agreement)

    def _check_aux(self, captured: torch.Tensor, reported: Sequence[torch.Tensor]) -> None:
        """Compare with the target's report, where entry L + 1 is the output of layer L."""
        chunks = captured.chunk(len(self._aux_layer_ids), dim=-1)
        for layer, chunk in zip(self._aux_layer_ids, chunks, strict=True):
            if layer + 1 == len(self._layers):
                continue  # transformers reports the last layer's output after the norm
            if not torch.equal(chunk, reported[layer + 1][0]):
                raise EngineError("hf", f"captured states of layer {layer} aren't that layer's")

    def close(self) -> None:
        """Forget the model; the store is its owner's to close."""
        del self._model, self._decoder, self._layers, self._final_norm
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
