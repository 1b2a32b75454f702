"""Keeps the states that a forward of SGLang computes, until their samples are stored.

SGLang packs the prompts of a forward into one tensor of rows, one row a token, and may run a
long prompt in several pieces. The recorder cuts the rows apart again; ``Recorder.take`` puts a
prompt's pieces together, or says what is missing. ``N`` rows of a forward, ``T`` tokens of a
prompt, ``H`` the target's hidden size, ``n`` auxiliary layers.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchspec_lib.types import Prompt

FORWARD_ARGUMENTS = (
    "input_ids",
    "hidden_states",
    "lm_head",
    "logits_metadata",
    "aux_hidden_states",
)
"""Of SGLang's ``LogitsProcessor.forward``, in their order; ``logits_metadata`` is a
``ForwardBatch``."""
BATCH_FIELDS = ("rids", "forward_mode", "extend_seq_lens_cpu", "extend_prefix_lens_cpu")
"""Of SGLang's ``ForwardBatch``."""


class IncompleteError(Exception):
    """A prompt's states weren't all computed, or aren't its own."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a prompt, in host memory once ``ready`` returns."""

    first: int
    """Position of its first token in the prompt."""
    input_ids: Tensor
    aux_hidden_states: Tensor
    """[T, n*H], layers ascending."""
    last_hidden_states: Tensor
    """[T, H], after the final norm."""
    ready: Callable[[], None]


class Recorder:
    """Records every prompt that runs, by its request's id. Taken from by other threads."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[Piece]] = {}
        self._lock = threading.Lock()
        self._side_stream: torch.cuda.Stream | None = None

    def hook(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
    ) -> None:
        """A forward hook for the target's ``LogitsProcessor``."""
        given = dict(zip(FORWARD_ARGUMENTS, args, strict=False)) | kwargs
        batch, aux = given["logits_metadata"], given.get("aux_hidden_states")
        if not batch.rids or aux is None or not batch.forward_mode.is_extend():
            return  # a warm-up, or the forward after a prompt
        packed_aux = aux if isinstance(aux, Tensor) else torch.cat(list(aux), dim=-1)
        tensors = given["input_ids"], packed_aux, given["hidden_states"]
        lengths = list(batch.extend_seq_lens_cpu)
        host, ready = self._to_host([tensor[: sum(lengths)] for tensor in tensors])
        spans = zip(*(tensor.split(lengths) for tensor in host), strict=True)
        firsts = batch.extend_prefix_lens_cpu
        with self._lock:
            for rid, first, (ids, aux_TnH, last_TH) in zip(batch.rids, firsts, spans, strict=True):
                piece = Piece(int(first), ids, aux_TnH, last_TH, ready)
                self._pieces.setdefault(rid, []).append(piece)

    def take(self, rid: str, prompt: Prompt) -> dict[str, Tensor]:
        """What a sample of ``prompt`` holds (see ``SampleRef``), once its copies are there.

        Raises:
            IncompleteError: Some of it wasn't computed, or other tokens were.
        """
        with self._lock:
            pieces = self._pieces.pop(rid, [])
        num_tokens = 0
        for piece in pieces:
            if piece.first != num_tokens:
                raise IncompleteError(
                    f"tokens {num_tokens} to {piece.first} weren't computed: a prefix cache?"
                )
            num_tokens += len(piece.input_ids)
        if num_tokens != prompt.num_tokens:
            raise IncompleteError(f"{num_tokens} of {prompt.num_tokens} tokens were captured")
        for piece in pieces:
            piece.ready()
        sample = {
            "input_ids": _joined([piece.input_ids for piece in pieces]).to(torch.int32),
            "loss_mask": torch.tensor(prompt.loss_mask, dtype=torch.bool),
            "aux_hidden_states": _joined([piece.aux_hidden_states for piece in pieces]),
            "last_hidden_states": _joined([piece.last_hidden_states for piece in pieces]),
        }
        if not torch.equal(sample["input_ids"], torch.tensor(prompt.token_ids, dtype=torch.int32)):
            raise IncompleteError("other tokens were captured than the prompt's")
        return sample

    def forget(self, rid: str) -> None:
        """Drop what was recorded of a request that nobody wants any more."""
        with self._lock:
            self._pieces.pop(rid, None)

    def _to_host(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Copies in host memory, complete once the function that comes with them returns.

        A GPU's go into pinned memory, on a stream of their own beside the next forward.
        """
        if tensors[0].device.type != "cuda":
            return [tensor.clone() for tensor in tensors], _nothing
        stream = self._side_stream = self._side_stream or torch.cuda.Stream(tensors[0].device)
        stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
        copies = []
        with torch.cuda.stream(stream):
            for tensor in tensors:
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies.append(pinned.copy_(tensor, non_blocking=True))
                tensor.record_stream(stream)
        return copies, stream.record_event().synchronize


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _nothing() -> None:
    pass
