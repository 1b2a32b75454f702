"""Copies micro-batches to a GPU on a stream of their own, beside the work on those before."""

from collections.abc import Iterable, Iterator

import torch

from torchspec_lib.models.batch import PackedBatch


class DeviceCopies:
    """A rank's way to its device; on a CPU batches are already there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ahead(self, batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
        """The same batches on the device, each one's copy started before the one before is used.

        The first copy starts with this call. No call waits for the device if the batches lie in
        page-locked memory; two of them are on the device at a time.
        """
        copies = map(self._copy, batches)
        return self._arrivals(copies, next(copies, None))

    def _arrivals(
        self, copies: Iterator[PackedBatch], following: PackedBatch | None
    ) -> Iterator[PackedBatch]:
        while following is not None:
            current = following
            if self._stream is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._stream)
            following = next(copies, None)
            yield current

    def _copy(self, batch: PackedBatch) -> PackedBatch:
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            copy = batch.to(self._device)
        # The memory is the copying stream's: it must not go there while the other reads it.
        copy.record_stream(torch.cuda.current_stream(self._device))
        return copy
