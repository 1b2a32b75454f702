"""Answers by Hugging Face transformers: batches of prompts of similar length, padded on the left.

Shapes: ``B`` answers of a batch that go on, ``T`` tokens of the longest prompt or one, ``S`` all
tokens so far, ``V`` vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from torchspec_lib.config.regeneration import RegenerationConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.models.target_model import load_target
from torchspec_lib.regeneration.generator import Generated, GenerationRequest
from torchspec_lib.regeneration.sampling import draw
from torchspec_lib.target import TargetSpec


class HFGenerator:
    """A causal LM that continues prompts, batch by batch.

    The same requests in the same order give the same answers. In other batches an answer has the
    same random numbers, but rounding may turn a close choice.
    """

    def __init__(
        self, model: nn.Module, settings: RegenerationConfig, eos_ids: Collection[int]
    ) -> None:
        """``model`` is in eval mode on its device."""
        self._model, self._settings, self._eos_ids = model, settings, frozenset(eos_ids)

    @classmethod
    def load(cls, run: RunConfig, target: TargetSpec) -> Self:
        device = torch.device(run.cluster.device)
        model = load_target(target, run.model.dtype, device, run.model.trust_remote_code)
        return cls(model, run.regeneration, target.eos_token_ids)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generated]:
        """Continue every prompt: one result each, in order."""
        by_length = iter(sorted(range(len(requests)), key=lambda i: len(requests[i].token_ids)))
        answers: dict[int, Generated] = {}
        while batch := list(islice(by_length, self._settings.batch_size)):
            answers |= zip(batch, self._batch([requests[i] for i in batch]), strict=True)
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _batch(self, requests: Sequence[GenerationRequest]) -> list[Generated]:
        """Continue prompts together; an answer that is finished leaves the batch."""
        batch = HFBatch(self._model, [request.token_ids for request in requests])
        numbers = [self._numbers(request) for request in requests]
        answers: list[list[int]] = [[] for _ in requests]
        going_on = list(range(len(requests)))
        while going_on:
            logits_BV = batch.logits()
            numbers_B = torch.tensor([next(numbers[i]) for i in going_on], device=logits_BV.device)
            drawn = draw(logits_BV, numbers_B, self._settings).tolist()
            for i, token in zip(going_on, drawn, strict=True):
                answers[i].append(token)
            staying = [
                row for row, i in enumerate(going_on) if not self._ends(answers[i], requests[i])
            ]
            batch.extend(staying, [drawn[row] for row in staying])
            going_on = [going_on[row] for row in staying]
        return [Generated(ids, ids[-1] in self._eos_ids) for ids in answers]

    def _ends(self, answer: Sequence[int], request: GenerationRequest) -> bool:
        return answer[-1] in self._eos_ids or len(answer) == request.max_new_tokens

    def _numbers(self, request: GenerationRequest) -> Iterator[float]:
        if self._settings.temperature == 0.0:
            return iter([0.0] * request.max_new_tokens)
        generator = np.random.default_rng(request.seed)
        numbers: list[float] = generator.random(request.max_new_tokens, dtype=np.float32).tolist()
        return iter(numbers)

    def close(self) -> None:
        """Nothing to end: what it holds goes with its process."""


class HFBatch:
    """Documents that are continued together: their keys and values, and their newest tokens."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        self._model: Any = model
        device = next(model.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        padded = [[*([0] * (longest - len(prompt))), *prompt] for prompt in prompts]
        lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts])
        self._newest_BT = torch.tensor(padded, device=device)
        places_T = torch.arange(longest) - longest
        self._is_token_BS = (places_T >= -lengths_B1).long().to(device)
        self._positions_BT = (places_T + lengths_B1).clamp(min=0).to(device)
        self._cache: Any = DynamicCache()

    def logits(self) -> Tensor:
        """[B, V] of what may follow the newest tokens, which are cached."""
        out = self._model(
            input_ids=self._newest_BT,
            attention_mask=self._is_token_BS,
            position_ids=self._positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV

    def extend(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Go on with some of the documents, and a token behind each."""
        if not rows:
            return
        if len(rows) < len(self._newest_BT):
            rows_B = torch.tensor(rows, device=self._newest_BT.device)
            self._cache.batch_select_indices(rows_B)
            self._is_token_BS = self._is_token_BS[rows_B]
            self._positions_BT = self._positions_BT[rows_B]
        self._newest_BT = torch.tensor(token_ids, device=self._newest_BT.device)[:, None]
        self._is_token_BS = nn.functional.pad(self._is_token_BS, (0, 1), value=1)
        self._positions_BT = self._positions_BT[:, -1:] + 1
