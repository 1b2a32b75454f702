"""Prompts that wait for an engine, and which engine may have which."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torchspec_lib.types import CaptureRequest


@dataclass(slots=True)
class Job:
    """A prompt on its way to a sample, over all its attempts."""

    request: CaptureRequest
    """The attempt that counts. A result under any other key comes too late."""
    num_failures: int = 0
    """Attempts that failed, not counting those that the store is to blame for."""
    num_losses: int = 0
    """Samples of it that the store lost."""
    avoid: int | None = None
    """The engine that failed last: another one shall try, if there is one."""
    is_suspect: bool = False
    """An engine died while it had this prompt among others. It is captured alone from now on, so
    that the prompt that ends engines is found, and no other is blamed for it."""


class JobQueue:
    """Oldest first; what is tried again comes before what is new, since a step waits for it."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()

    def append(self, job: Job) -> None:
        self._jobs.append(job)

    def put_back(self, jobs: Sequence[Job]) -> None:
        self._jobs.extendleft(reversed(jobs))

    def pop(self, engine: int, limit: int, is_idle: bool, has_others: bool) -> list[Job]:
        """Take up to ``limit`` jobs that ``engine`` may have; none if it shall wait.

        Args:
            engine: Its index.
            limit: A suspect comes alone, whatever the limit.
            is_idle: Whether the engine has no call; only then it may have a suspect.
            has_others: Whether any other engine could have what this one shall avoid.
        """
        taken: list[Job] = []
        kept: list[Job] = []
        while self._jobs and len(taken) < limit:
            job = self._jobs.popleft()
            if has_others and job.avoid == engine:
                kept.append(job)
            elif not job.is_suspect:
                taken.append(job)
            else:
                if taken or not is_idle:
                    kept.append(job)
                else:
                    taken.append(job)
                break
        self._jobs.extendleft(reversed(kept))
        return taken
