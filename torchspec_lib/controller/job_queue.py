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

    @property
    def num_tokens(self) -> int:
        return self.request.prompt.num_tokens


class JobQueue:
    """Oldest first; what is tried again comes before what is new, since a step waits for it."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def append(self, job: Job) -> None:
        self._jobs.append(job)

    def put_back(self, jobs: Sequence[Job]) -> None:
        self._jobs.extendleft(reversed(jobs))

    def pop(
        self, engine: int, max_prompts: int, max_tokens: int, is_idle: bool, has_others: bool
    ) -> list[Job]:
        """Take the next jobs that ``engine`` may have in one call; none if it shall wait.

        Args:
            engine: Its index.
            max_prompts: Of the call.
            max_tokens: Of the call; a longer prompt comes alone. So does a suspect.
            is_idle: Whether the engine has no call; only then it may have a suspect.
            has_others: Whether any other engine could have what this one shall avoid.
        """
        taken: list[Job] = []
        kept: list[Job] = []
        while self._jobs and len(taken) < max_prompts:
            job = self._jobs.popleft()
            if has_others and job.avoid == engine:
                kept.append(job)
                continue
            if job.is_suspect:
                fits = is_idle and not taken
            else:
                fits = not taken or job.num_tokens <= max_tokens
            (taken if fits else kept).append(job)
            if job.is_suspect or not fits:
                break
            max_tokens -= job.num_tokens
        self._jobs.extendleft(reversed(kept))
        return taken
