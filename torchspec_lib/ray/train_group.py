"""The trainer ranks as one: they start together, and when one is lost they all end."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NoReturn, Self

import ray
from ray.exceptions import RayError

from torchspec_lib.errors import HungError, TorchSpecError
from torchspec_lib.ray.failures import unwrap
from torchspec_lib.ray.placement_group import Slot
from torchspec_lib.ray.ray_actor import RayActor

START_TIMEOUT_S = 300.0
"""For all ranks to be constructed, and again to meet: torch is imported, weights are read."""
ECHO_S = 2.0
"""When one rank fails, its peers' collectives break at once, and may be heard of first."""
EXIT_TIMEOUT_S = 5.0


class RayTrainGroup:
    """All trainer ranks of a run. ``start`` gives one that is up; a failure ends it whole."""

    def __init__(self, actors: Sequence[Any]) -> None:
        """Take over ``actors``, in the order of their ranks."""
        self._actors = list(actors)
        self._ranks: dict[Any, int] = {}
        """Who answers an outstanding call."""

    @classmethod
    def start(
        cls,
        actor_class: type[RayActor],
        specs: Sequence[Any],
        slots: Sequence[Slot],
        timeout_s: float = START_TIMEOUT_S,
    ) -> Self:
        """Start one rank per spec, and let them meet; all of them or none.

        Args:
            actor_class: Besides ``RayActor``'s it has the methods ``create_rendezvous()``,
                which gives host and port on rank 0, ``join(host, port)``, ``run(*args)``
                and ``export(path)``.
            specs: The constructor's argument, in the order of the ranks.
            slots: Where the ranks go, in the same order.
            timeout_s: For the constructors, and again for the ranks to meet.

        Raises:
            WorkerLostError: A rank died, or wasn't ready in time (``HungError``).
            Exception: What a rank's own constructor or method raised.
        """
        remote_class = ray.remote(actor_class)
        group = cls([])
        with ExitStack() as undo:
            undo.callback(group.kill)
            for spec, slot in zip(specs, slots, strict=True):
                options = slot.options("training")
                group._actors.append(remote_class.options(**options).remote(spec))
            group.wait(group._call("ping"), timeout_s)
            rank_0 = group._actors[0].create_rendezvous.remote()
            group._ranks[rank_0] = 0
            [(host, port)] = group.wait([rank_0], timeout_s)
            group.wait(group._call("join", host, port), timeout_s)
            undo.pop_all()
        return group

    def run(self, *args: Any) -> list[Any]:
        """Start ``run(*args)`` on every rank; hand the references to ``wait``."""
        return self._call("run", *args)

    def export(self, path: str, timeout_s: float | None = None) -> None:
        """Have the ranks write the draft together; raises as ``wait`` does."""
        self.wait(self._call("export", path), timeout_s)

    def wait(self, refs: Sequence[Any], timeout_s: float | None = None) -> list[Any]:
        """Wait for calls of this group, all or some of those that are out.

        As soon as one rank fails, the others are killed: they would hang in a collective.

        Returns:
            The calls' results, in order.

        Raises:
            WorkerLostError: A rank died, or ``timeout_s`` went by (``HungError``).
            Exception: What a rank raised; the first cause, not its echo in the peers.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        waiting = list(refs)
        while waiting:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            done, waiting = ray.wait(waiting, num_returns=1, timeout=left)
            if not done:
                self._fail(self._lost_in_silence(waiting[0], timeout_s))
            error = self._failure(done[0])
            if error is not None:
                self._fail(self._first_cause(error))
        results: list[Any] = ray.get(list(refs))
        return results

    def shutdown(self) -> None:
        """End all ranks, gracefully where they aren't busy. Safe to call twice."""
        exits = [actor.exit.remote() for actor in self._actors]
        if exits:
            ray.wait(exits, num_returns=len(exits), timeout=EXIT_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End all ranks at once. Safe to call twice."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
        self._ranks.clear()

    def _call(self, method: str, *args: Any) -> list[Any]:
        refs = [getattr(actor, method).remote(*args) for actor in self._actors]
        self._ranks.update({ref: rank for rank, ref in enumerate(refs)})
        return refs

    def _failure(self, done: Any) -> Exception | None:
        """What a finished call raised."""
        role = f"trainer rank {self._ranks.pop(done)}"
        try:
            ray.get(done)
        except RayError as error:
            failure = unwrap(error, role)
            if failure is not error:
                failure.__cause__ = error  # the remote traceback
            return failure
        return None

    def _first_cause(self, first: Exception) -> Exception:
        """Of the failures that arrive together, the one that caused the others."""
        failures = [first]
        deadline = time.monotonic() + ECHO_S
        while self._ranks and not isinstance(failures[-1], TorchSpecError):
            left = max(deadline - time.monotonic(), 0.0)
            done, _ = ray.wait(list(self._ranks), num_returns=1, timeout=left)
            if not done:
                break
            error = self._failure(done[0])
            if error is not None:
                failures.append(error)
        return min(failures, key=_likely_echo)

    def _lost_in_silence(self, ref: Any, timeout_s: float | None) -> HungError:
        return HungError(f"trainer rank {self._ranks[ref]}", f"no answer for {timeout_s:.0f} s")

    def _fail(self, error: Exception) -> NoReturn:
        self.kill()
        raise error


def _likely_echo(error: Exception) -> int:
    """A collective that lost its peer raises RuntimeError; ours and others say more."""
    if isinstance(error, TorchSpecError):
        return 0
    return 2 if isinstance(error, RuntimeError) else 1
