"""What every engine checks, of prompts and of itself."""

from pathlib import Path

import numpy as np
import torch

from torchspec_lib.target import TargetSpec
from torchspec_lib.types import Prompt

MAX_LOGIT_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of rebuilt logits, relative to the largest logit, by dtype."""


def problem_of(prompt: Prompt, target: TargetSpec) -> str | None:
    """Why the target can't run a prompt at all, if so."""
    if prompt.num_tokens > target.max_position_embeddings:
        return "longer than the target's max_position_embeddings"
    ids = prompt.token_ids
    if len(ids) == 0 or ids.min() < 0 or ids.max() >= target.vocab_size:
        return "token ids outside the target's vocabulary"
    return None


def probe_prompt(target: TargetSpec, num_tokens: int = 32) -> Prompt:
    """Distinct, spread-out ids: any mix-up of positions shows. Shorter if the target is."""
    num_tokens = min(num_tokens, target.max_position_embeddings)
    ids = (np.arange(1, num_tokens + 1) * 7919) % target.vocab_size
    return Prompt("probe", ids.astype(np.int32), np.ones(num_tokens, np.bool_))


def weight_bytes(target: TargetSpec) -> int:
    """Bytes of the target's weight files."""
    return sum(file.stat().st_size for file in Path(target.path).glob("*.safetensors"))
