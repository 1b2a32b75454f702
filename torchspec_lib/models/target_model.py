"""The whole target as a Hugging Face model, and how to look at its states as it runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchspec_lib.errors import EngineError
from torchspec_lib.target import TargetSpec


def load_target(
    target: TargetSpec, dtype: str, device: torch.device, trust_remote_code: bool
) -> nn.Module:
    """The target as a causal LM, in eval mode on its device.

    On a GPU torch's cuDNN attention is switched off for this process: it makes a plan, some 45 ms,
    for every new length of queries or keys, and prompts and answers have all lengths.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        target.path, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
    )
    return model.to(device).eval()


def decoder_parts(model: nn.Module) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
    """The decoder without its head, its layers, and its final norm.

    Raises:
        EngineError: The model isn't built like a Llama.
    """
    decoder = getattr(model, "model", None)
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    if decoder is None or not isinstance(layers, nn.ModuleList) or norm is None:
        raise EngineError(
            "hf", f"{type(model).__name__} has no model.layers and model.norm to capture from"
        )
    return decoder, layers, norm


@contextmanager
def captured_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs [T, Ht] of ``modules`` in the latest forward of one sequence, in their order."""
    states: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states[index] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(modules)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
