"""A micro-batch: samples packed one after the other, without padding.

Shapes: ``T`` tokens of the whole pack, ``D`` documents (samples), ``A`` width of the
concatenated auxiliary states (n * Ht), ``H`` here the target's hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec_lib.models.chains import Chains, find_chains, recorded

_INT_DTYPES = (torch.int32, torch.int64)
_COLUMNS = ("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_states")


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


class BatchBuilder:
    """Packs samples as they come: each is copied once, when it is added, to where it stays."""

    def __init__(self, num_tokens: int, pin_memory: bool = False) -> None:
        """Room for ``num_tokens``, in page-locked memory if told."""
        self._room, self._pin_memory = num_tokens, pin_memory
        self._columns: dict[str, Tensor] = {}
        self._doc_starts = [0]

    @property
    def num_samples(self) -> int:
        return len(self._doc_starts) - 1

    def add(self, sample: Mapping[str, Tensor]) -> None:
        """Append a sample as the store hands it out (see ``types.SampleRef``).

        Raises:
            ValueError: Its tensors don't fit each other, its neighbours or the room.
        """
        if not self._columns:
            self._columns = {name: self._column(name, sample[name]) for name in _COLUMNS}
        _check(self.num_samples, sample, self._columns)
        start = self._doc_starts[-1]
        end = start + len(sample["input_ids"])
        if end > self._room:
            raise ValueError(f"sample {self.num_samples} makes {end} tokens of {self._room}")
        for name, column in self._columns.items():
            column[start:end].copy_(sample[name])
        self._doc_starts.append(end)

    def build(self) -> PackedBatch:
        """The samples so far.

        Raises:
            ValueError: There are none.
        """
        if not self.num_samples:
            raise ValueError("no samples to pack: a rank without any takes empty_batch()")
        doc_starts = tuple(self._doc_starts)
        ids_T, loss_mask_T, aux_TA, last_TH = (
            self._columns[name][: doc_starts[-1]] for name in _COLUMNS
        )
        chains = find_chains(loss_mask_T, doc_starts)
        return PackedBatch(
            ids_T,
            loss_mask_T,
            aux_TA,
            last_TH,
            doc_starts,
            chains.pin_memory() if self._pin_memory else chains,
        )

    def _column(self, name: str, like: Tensor) -> Tensor:
        dtype = torch.int64 if name == "input_ids" else like.dtype
        shape = (self._room, *like.shape[1:])
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin_memory)


def pack(samples: Sequence[Mapping[str, Tensor]], pin_memory: bool = False) -> PackedBatch:
    """Pack samples in this order, into page-locked memory if told.

    Raises:
        ValueError: No samples, or one whose tensors don't fit each other or its neighbours.
    """
    builder = BatchBuilder(sum(len(sample["input_ids"]) for sample in samples), pin_memory)
    for sample in samples:
        builder.add(sample)
    return builder.build()


def empty_batch(aux_width: int, hidden: int, dtype: torch.dtype) -> PackedBatch:
    """One unsupervised token: lets a rank without samples take part in the collectives."""
    return PackedBatch(
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.bool),
        torch.zeros(1, aux_width, dtype=dtype),
        torch.zeros(1, hidden, dtype=dtype),
        (0, 1),
    )


def _check(index: int, sample: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> None:
    num_tokens = sample["input_ids"].shape[0]
    for name, column in columns.items():
        expected = (num_tokens, *column.shape[1:])
        if tuple(sample[name].shape) != expected or num_tokens == 0:
            raise ValueError(
                f"sample {index}: {name} has shape {list(sample[name].shape)}, not "
                f"{list(expected)} of at least one token"
            )
    if sample["loss_mask"].dtype != torch.bool or sample["input_ids"].dtype not in _INT_DTYPES:
        raise ValueError(
            f"sample {index}: input_ids must be int32 or int64 and loss_mask bool, not "
            f"{sample['input_ids'].dtype} and {sample['loss_mask'].dtype}"
        )
