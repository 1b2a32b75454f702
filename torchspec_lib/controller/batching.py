"""How the samples of a step fall onto ranks and into micro-batches."""

from collections.abc import Sequence

from torchspec_lib.types import MicroBatch, SampleRef


def split_step(
    samples: Sequence[SampleRef], world_size: int, micro_batch_tokens: int
) -> tuple[tuple[MicroBatch, ...], ...]:
    """Deal a step's samples out: ranks balanced by tokens, equally many micro-batches each.

    Longest first onto the rank with the fewest tokens (Graham 1969), then first fit into
    micro-batches of at most ``micro_batch_tokens``. A rank with fewer gets empty ones, since
    every micro-batch is a collective. Depends on the samples' sizes and order alone.
    """
    ranks: list[list[SampleRef]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for sample in sorted(samples, key=lambda s: -s.num_tokens):
        lightest = loads.index(min(loads))
        ranks[lightest].append(sample)
        loads[lightest] += sample.num_tokens
    packed = [_first_fit(share, micro_batch_tokens) for share in ranks]
    num_micro_batches = max(1, *map(len, packed))
    return tuple(
        tuple(map(tuple, batches)) + ((),) * (num_micro_batches - len(batches))
        for batches in packed
    )


def _first_fit(samples: Sequence[SampleRef], budget: int) -> list[list[SampleRef]]:
    batches: list[list[SampleRef]] = []
    room: list[int] = []
    for sample in samples:
        fits = next((i for i, left in enumerate(room) if sample.num_tokens <= left), None)
        if fits is None:
            batches.append([sample])
            room.append(budget - sample.num_tokens)
        else:
            batches[fits].append(sample)
            room[fits] -= sample.num_tokens
    return batches
