"""Fetches the samples of coming steps while the current one is computed.

Who waits for whom: the fetching thread waits for the controller to compose a step, for the
store, and for room ahead; the trainer waits for a prepared step. Each consumed step makes
room for one more.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torchspec_lib.errors import SampleLostError, StoreUnavailableError
from torchspec_lib.models.batch import BatchBuilder, PackedBatch
from torchspec_lib.training.control import TrainingControl
from torchspec_lib.transfer.store import TensorStore
from torchspec_lib.types import CaptureFailure, CaptureResult, MicroBatch, SampleKey, SampleRef

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 5.0
_GET_ATTEMPTS = 3
"""For a store that doesn't answer; each waits as long as its programs take to come back."""


@dataclass(frozen=True, slots=True, eq=False)
class PreparedStep:
    """A rank's share of a step, in host memory and out of the store."""

    step: int
    batches: tuple[PackedBatch, ...]
    """One for each micro-batch; an empty one holds a single unsupervised token."""
    trained: tuple[SampleKey, ...]
    """The samples in ``batches``."""
    rejected: tuple[CaptureFailure, ...]
    """Samples of the step that were lost, and couldn't be captured again."""
    num_tokens: int
    """Of ``trained``."""
    wait_s: float = 0.0
    """How long the trainer waited for this step."""


@dataclass(slots=True)
class _Fetched:
    """What became of the samples of a step so far."""

    refs: list[SampleRef] = field(default_factory=list)
    lost: list[SampleKey] = field(default_factory=list)
    rejected: list[CaptureFailure] = field(default_factory=list)


class Prefetcher:
    """Iterates over a rank's prepared steps, ``prefetch_steps`` of them fetched ahead.

    Start it by entering it (``with``), which also ends the thread. What goes wrong in the
    thread is raised where the step is asked for.
    """

    def __init__(
        self,
        control: TrainingControl,
        store: TensorStore,
        rank: int,
        first_step: int,
        prefetch_steps: int,
        empty: PackedBatch,
        pin_memory: bool,
    ) -> None:
        """``empty`` stands for a micro-batch without samples; pinned memory is CUDA's."""
        self._control, self._store, self._rank = control, store, rank
        self._first_step, self._pin_memory = first_step, pin_memory
        self._empty = empty.pin_memory() if pin_memory else empty
        self._room = threading.Semaphore(prefetch_steps)
        self._unreleased: list[SampleKey] = []
        self._prepared: queue.SimpleQueue[PreparedStep | BaseException | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self.doing = "starting to fetch"
        """What the thread is at, in a few words, for who looks on."""

    def __enter__(self) -> "Prefetcher":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the thread. One that waits for the control plane ends with its process."""
        self._closing.set()
        self._room.release()
        self._thread.join(_JOIN_TIMEOUT_S)
        self._release([])

    def __iter__(self) -> Iterator[PreparedStep]:
        while True:
            start = time.monotonic()
            prepared = self._prepared.get()
            if prepared is None:
                return
            if isinstance(prepared, BaseException):
                raise prepared
            self._room.release()
            yield replace(prepared, wait_s=time.monotonic() - start)

    def _run(self) -> None:
        try:
            step = self._first_step
            while self._has_room():
                self.doing = f"waiting for samples of step {step}"
                micro_batches = self._control.next_step(self._rank, step)
                if micro_batches is None:
                    break
                self.doing = f"fetching step {step}"
                self._prepared.put(self._prepare(step, micro_batches))
                step += 1
            self.doing = "all is fetched"
            self._prepared.put(None)
        except BaseException as error:  # noqa: BLE001 - raised where the step is asked for
            self._prepared.put(error)

    def _has_room(self) -> bool:
        """Wait for room ahead; False if nobody wants another step."""
        self.doing = "enough steps are fetched ahead"
        self._room.acquire()
        return not self._closing.is_set()

    def _prepare(self, step: int, micro_batches: tuple[MicroBatch, ...]) -> PreparedStep:
        fetched = _Fetched()
        batches = []
        for refs in micro_batches:
            batch = BatchBuilder(sum(ref.num_tokens for ref in refs), self._pin_memory)
            for ref in refs:
                self._fetch(ref, batch, fetched)
            batches.append(batch.build() if batch.num_samples else self._empty)
        keys = [ref.key for ref in fetched.refs]
        if keys or fetched.lost:
            # What is left of a lost sample goes too; its bytes moved on to the next attempt.
            self._release(keys + fetched.lost)
            self._control.fetched(keys)
        return PreparedStep(
            step=step,
            batches=tuple(batches),
            trained=tuple(keys),
            rejected=tuple(fetched.rejected),
            num_tokens=sum(ref.num_tokens for ref in fetched.refs),
        )

    def _release(self, keys: Sequence[SampleKey]) -> None:
        """Free samples; what the store doesn't answer to is tried again with the next step's."""
        self._unreleased += keys
        if not self._unreleased:
            return
        try:
            self._store.release(self._unreleased)
        except StoreUnavailableError as error:
            logger.warning("event=unreleased samples=%d error=%s", len(self._unreleased), error)
        else:
            self._unreleased.clear()

    def _fetch(self, ref: SampleRef, batch: BatchBuilder, fetched: _Fetched) -> None:
        """Copy a sample out. A lost one is captured again, until it is there or rejected."""
        current: CaptureResult = ref
        while isinstance(current, SampleRef):
            try:
                self._copy(current, batch)
            except SampleLostError as error:
                logger.warning("event=lost sample=%s error=%s", current.key, error)
                fetched.lost.append(current.key)
                self.doing = f"capturing sample {current.key} again"
                current = self._control.recapture(current)
            else:
                fetched.refs.append(current)
                return
        fetched.rejected.append(current)

    def _copy(self, ref: SampleRef, batch: BatchBuilder) -> None:
        """Copy a sample out, also if the store doesn't answer for a while.

        Raises:
            SampleLostError: It isn't there any more.
            StoreUnavailableError: The store stays away, for this rank at least.
        """
        for attempt in range(1, _GET_ATTEMPTS + 1):
            try:
                with self._store.borrow(ref) as sample:
                    batch.add(sample)
                return
            except StoreUnavailableError as error:
                if attempt == _GET_ATTEMPTS:
                    raise
                logger.warning("event=store_away sample=%s error=%s", ref.key, error)
