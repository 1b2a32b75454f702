"""Which engine gets which prompts next."""

import heapq
from collections.abc import Iterator, Sequence

from torchspec_lib.controller.engine_slot import Call, EngineSlot
from torchspec_lib.controller.job_queue import JobQueue
from torchspec_lib.controller.limits import CapturePolicy


def next_calls(
    slots: Sequence[EngineSlot], queue: JobQueue, policy: CapturePolicy
) -> Iterator[tuple[EngineSlot, Call]]:
    """Begin calls for what waits, as far as engines have room: fewest outstanding tokens first."""
    free = [(slot.num_tokens, slot.index) for slot in slots if slot.has_room]
    heapq.heapify(free)
    num_engines = sum(not slot.is_given_up for slot in slots)
    while free and queue:
        slot = slots[heapq.heappop(free)[1]]
        jobs = queue.pop(
            slot.index, policy.call_prompts, policy.call_tokens, slot.is_idle, num_engines > 1
        )
        if jobs:
            yield slot, slot.begin(jobs)
            if slot.has_room:
                heapq.heappush(free, (slot.num_tokens, slot.index))
