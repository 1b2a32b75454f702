"""Keeps the states that a forward of SGLang computes, until their samples are stored.

SGLang packs the prompts of a forward into one tensor of rows, one row a token, and may run a
long prompt in several pieces. The recorder cuts the rows apart again; ``Recorder.take`` puts a
prompt's pieces together, or says what is missing. ``N`` rows of a forward, ``T`` tokens of a
prompt, ``H`` the target's hidden size, ``n`` auxiliary layers.

A GPU's states go to pinned memory on a stream of their own, but not right behind their forward:
the tokens that SGLang fetches then would wait for them (10 ms behind 512 MiB). They go when the
next forward begins, or when a sample is asked for.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
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


class Rows:
    """What a forward computed: ids [N], auxiliary states [N, n*H], last states [N, H].

    The auxiliary layers ascend; the last states come after the final norm.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """``tensors`` are nobody else's; the current stream computes them."""
        self._tensors, self._moved = list(tensors), None
        on_gpu = tensors[0].is_cuda
        self._computed = torch.cuda.current_stream().record_event() if on_gpu else None

    def start_moving(self, stream: torch.cuda.Stream) -> None:
        """Have ``stream`` copy them to host memory."""
        assert self._computed is not None
        with torch.cuda.stream(stream):
            stream.wait_event(self._computed)
            for i, tensor in enumerate(self._tensors):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
                self._tensors[i] = host.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
            self._moved = stream.record_event()

    def on_host(self, span: slice) -> list[Tensor]:
        """Some of the rows. Waits for them to arrive."""
        if self._moved is not None:
            self._moved.synchronize()
        return [tensor[span] for tensor in self._tensors]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a prompt."""

    first: int
    """Position of its first token in the prompt."""
    rows: Rows
    span: slice

    @property
    def end(self) -> int:
        length: int = self.span.stop - self.span.start
        return self.first + length


class Recorder:
    """Records every prompt that runs, by its request's id. Taken from by other threads."""

    def __init__(self, device: torch.device) -> None:
        """``device`` is the target's."""
        self._pieces: dict[str, list[Piece]] = {}
        self._lock = threading.Lock()
        self._staying: list[Rows] = []
        """On the GPU, still."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start_moving(self, *_: object) -> None:
        """Have what was computed so far brought to host memory. A forward pre-hook, too."""
        with self._lock:
            for rows in self._staying:
                assert self._stream is not None
                rows.start_moving(self._stream)
            self._staying.clear()

    def hook(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
    ) -> None:
        """A forward hook for the target's ``LogitsProcessor``."""
        given = dict(zip(FORWARD_ARGUMENTS, args, strict=False)) | kwargs
        batch, aux = given["logits_metadata"], given.get("aux_hidden_states")
        if not batch.rids or aux is None or not batch.forward_mode.is_extend():
            return  # a warm-up, or the forward after a prompt
        lengths = list(batch.extend_seq_lens_cpu)
        num_rows = sum(lengths)
        parts = [aux] if isinstance(aux, Tensor) else aux
        rows = Rows(
            [
                given["input_ids"][:num_rows].clone(),
                torch.cat([part[:num_rows] for part in parts], dim=-1),
                given["hidden_states"][:num_rows].clone(),
            ]
        )
        ends = list(accumulate(lengths))
        firsts = batch.extend_prefix_lens_cpu
        with self._lock:
            for rid, first, end, length in zip(batch.rids, firsts, ends, lengths, strict=True):
                piece = Piece(int(first), rows, slice(end - length, end))
                self._pieces.setdefault(rid, []).append(piece)
            if self._stream is not None:
                self._staying.append(rows)

    def take(self, rid: str, prompt: Prompt) -> dict[str, Tensor]:
        """What a sample of ``prompt`` holds (see ``SampleRef``), in host memory.

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
            num_tokens = piece.end
        if num_tokens != prompt.num_tokens:
            raise IncompleteError(f"{num_tokens} of {prompt.num_tokens} tokens were captured")
        self.start_moving()
        ids, aux, last = zip(*(piece.rows.on_host(piece.span) for piece in pieces), strict=True)
        sample = {
            "input_ids": _joined(ids).to(torch.int32),
            "loss_mask": torch.tensor(prompt.loss_mask, dtype=torch.bool),
            "aux_hidden_states": _joined(aux),
            "last_hidden_states": _joined(last),
        }
        if not torch.equal(sample["input_ids"], torch.tensor(prompt.token_ids, dtype=torch.int32)):
            raise IncompleteError("other tokens were captured than the prompt's")
        return sample

    def forget(self, rid: str) -> None:
        """Drop what was recorded of a request that nobody wants any more."""
        with self._lock:
            self._pieces.pop(rid, None)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
