"""A micro-batch: samples packed one after the other, without padding.

Shapes: ``T`` tokens of the whole pack, ``D`` documents (samples), ``A`` width of the
concatenated auxiliary states (n * Ht), ``H`` here the target's hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from torchspec_lib.models.chains import Chains, find_chains, recorded

_INT_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Samples of one forward and backward.

    Example:
        Two samples of 3 and 2 tokens: ``doc_starts == (0, 3, 5)``.
    """

    input_ids_T: Tensor
    """int64."""
    loss_mask_T: Tensor
    """bool: which tokens are the assistant's."""
    aux_states_TA: Tensor
    last_states_TH: Tensor
    """After the target's final norm."""
    doc_starts: tuple[int, ...]
    """D + 1 entries: where each document starts, and T."""
    found_chains: Chains | None = None
    """Left out where a batch is made, in host memory: they are found there."""

    def __post_init__(self) -> None:
        if self.found_chains is None:
            found = find_chains(self.loss_mask_T, self.doc_starts)
            object.__setattr__(self, "found_chains", found)

    @property
    def chains(self) -> Chains:
        """What is trained of the batch; its size is known without asking the device."""
        assert self.found_chains is not None
        return self.found_chains

    @property
    def num_tokens(self) -> int:
        return self.doc_starts[-1]

    def to(self, device: torch.device) -> "PackedBatch":
        return self._map(
            lambda tensor: tensor.to(device, non_blocking=True), self.chains.to(device)
        )

    def pin_memory(self) -> "PackedBatch":
        """A copy in page-locked memory, from which a GPU copies without blocking the host."""
        return self._map(lambda tensor: tensor.pin_memory(), self.chains.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory, which another stream's allocator gave, until ``stream`` is through."""
        self.chains.record_stream(stream)
        self._map(lambda tensor: recorded(tensor, stream), self.chains)

    def _map(self, change: Callable[[Tensor], Tensor], chains: Chains) -> "PackedBatch":
        return PackedBatch(
            change(self.input_ids_T),
            change(self.loss_mask_T),
            change(self.aux_states_TA),
            change(self.last_states_TH),
            self.doc_starts,
            chains,
        )


def pack(samples: Sequence[Mapping[str, Tensor]], pin_memory: bool = False) -> PackedBatch:
    """Pack samples as the store hands them out (see ``types.SampleRef``), in this order.

    Args:
        samples: At least one.
        pin_memory: Into page-locked memory, with no copy in between.

    Raises:
        ValueError: No samples, or one whose tensors don't fit each other or its neighbours.
    """
    if not samples:
        raise ValueError("no samples to pack: a rank without any takes empty_batch()")
    widths = samples[0]["aux_hidden_states"].shape[-1], samples[0]["last_hidden_states"].shape[-1]
    for i, sample in enumerate(samples):
        _check(i, sample, *widths)
    lengths = [len(sample["input_ids"]) for sample in samples]
    doc_starts = tuple(accumulate(lengths, initial=0))
    loss_mask_T = _joined(samples, "loss_mask", pin_memory)
    chains = find_chains(loss_mask_T, doc_starts)
    return PackedBatch(
        _joined(samples, "input_ids", pin_memory, torch.int64),
        loss_mask_T,
        _joined(samples, "aux_hidden_states", pin_memory),
        _joined(samples, "last_hidden_states", pin_memory),
        doc_starts,
        chains.pin_memory() if pin_memory else chains,
    )


def _joined(
    samples: Sequence[Mapping[str, Tensor]],
    name: str,
    pin_memory: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Copied once, to where it stays."""
    parts = [sample[name] for sample in samples]
    num_rows = sum(map(len, parts))
    out = torch.empty(
        (num_rows, *parts[0].shape[1:]), dtype=dtype or parts[0].dtype, pin_memory=pin_memory
    )
    return torch.cat(parts, out=out)


def empty_batch(aux_width: int, hidden: int, dtype: torch.dtype) -> PackedBatch:
    """One unsupervised token: lets a rank without samples take part in the collectives."""
    return PackedBatch(
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.bool),
        torch.zeros(1, aux_width, dtype=dtype),
        torch.zeros(1, hidden, dtype=dtype),
        (0, 1),
    )


def _check(index: int, sample: Mapping[str, Tensor], aux_width: int, hidden: int) -> None:
    num_tokens = sample["input_ids"].shape[0]
    expected = {
        "input_ids": (num_tokens,),
        "loss_mask": (num_tokens,),
        "aux_hidden_states": (num_tokens, aux_width),
        "last_hidden_states": (num_tokens, hidden),
    }
    for name, shape in expected.items():
        if tuple(sample[name].shape) != shape or num_tokens == 0:
            raise ValueError(
                f"sample {index}: {name} has shape {list(sample[name].shape)}, not {list(shape)} "
                "of at least one token"
            )
    if sample["loss_mask"].dtype != torch.bool or sample["input_ids"].dtype not in _INT_DTYPES:
        raise ValueError(
            f"sample {index}: input_ids must be int32 or int64 and loss_mask bool, not "
            f"{sample['input_ids'].dtype} and {sample['loss_mask'].dtype}"
        )
