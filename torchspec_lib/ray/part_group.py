"""Actors that make up one thing together with the process that starts them."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import ray
from ray.exceptions import RayError

from torchspec_lib.errors import WorkerLostError
from torchspec_lib.ray.failures import get, unwrap
from torchspec_lib.ray.placement_group import Slot
from torchspec_lib.ray.ray_actor import RayActor

START_TIMEOUT_S = 300.0
"""For all of them to be constructed, where their predecessors may just be ending."""


class PartGroup:
    """They end with whoever started them, however it ends, and it can wait for the end of one.

    Ray doesn't start a lost one again: whoever started it has to end, and to begin anew.
    """

    def __init__(
        self,
        name: str,
        actor_class: type[RayActor],
        specs: Sequence[Any],
        slots: Sequence[Slot],
        timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """Start an actor per spec; all of them or none.

        Args:
            name: What errors call all of them together.
            actor_class: Besides ``RayActor``'s it has a method ``run``, which ends only with it.
            specs: The constructor's argument, for each.
            slots: Where they go, in the same order.
            timeout_s: For the constructors.

        Raises:
            WorkerLostError: One died, or wasn't there in time (``HungError``).
            Exception: What a constructor raised.
        """
        remote_class = ray.remote(actor_class)
        self._name = name
        self._actors: list[Any] = []
        self._running: list[Any] = []
        with ExitStack() as undo:
            undo.callback(self.kill)
            for spec, slot in zip(specs, slots, strict=True):
                options = slot.options("inference")
                self._actors.append(remote_class.options(**options).remote(spec))
            get([actor.ping.remote() for actor in self._actors], timeout_s, name)
            undo.pop_all()

    def run(self, arguments: Sequence[Any]) -> None:
        """Call ``run`` of each actor with its argument; returns at once."""
        pairs = zip(self._actors, arguments, strict=True)
        self._running = [actor.run.remote(argument) for actor, argument in pairs]

    def first_end(self, timeout_s: float | None = None) -> Exception | None:
        """Wait until a ``run`` has ended: why. None if all are running after ``timeout_s``."""
        done, _ = ray.wait(self._running, num_returns=1, timeout=timeout_s)
        if not done:
            return None
        try:
            ray.get(done[0])
        except RayError as error:
            return unwrap(error, self._name)
        return WorkerLostError(self._name, "it returned")

    def kill(self) -> None:
        """End all of them at once. Safe to call twice."""
        for actor in self._actors:
            ray.kill(actor)
