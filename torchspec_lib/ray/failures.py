"""What Ray reports of a failed call, as our own errors."""

from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from torchspec_lib.errors import HungError, WorkerLostError

DEATHS = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    LocalRayletDiedError,
    OutOfMemoryError,
    ObjectLostError,
)
ADVICE = " Some common causes include"
"""Where Ray's account of a death ends and its generic advice begins."""


def get(refs: Any, timeout_s: float | None = None, role: str | None = None) -> Any:
    """``ray.get``, with the remote side's own errors.

    Raises:
        HungError: There was no answer for ``timeout_s``; ``role`` says from whom.
    """
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError as error:
        raise HungError(role or "an actor", f"no answer for {timeout_s:.0f} s") from error
    except RayError as error:
        raise unwrap(error, role) from error


def unwrap(error: RayError, role: str | None = None) -> Exception:
    """What really went wrong: the remote side's own exception, or ``WorkerLostError``.

    Raise it ``from error``, which holds the remote traceback. An exception that a constructor
    raised keeps its type too: it must not pass for a death, which is worth a retry.

    Args:
        error: What ``ray.get`` raised.
        role: Whom the call went to, such as ``trainer rank 1``. The actor's class if left out.
    """
    if isinstance(error, RayTaskError):
        cause = error.cause
        # A death seen from inside the callee is somebody else's: its role isn't ours.
        return unwrap(cause) if isinstance(cause, RayError) else cause
    if isinstance(error, ActorDiedError) and error.actor_init_failed:
        # Ray keeps the constructor's error in no attribute, only among the arguments.
        return unwrap(error.args[0], role)
    if isinstance(error, DEATHS):
        return _lost(str(error), role)
    return error


def _lost(account: str, role: str | None) -> WorkerLostError:
    """``account`` is Ray's: tab-indented ``name: value`` lines, then sentences."""
    lines = account.split(ADVICE)[0].splitlines()
    facts = dict(line.strip().split(": ", 1) for line in lines if line.startswith("\t"))
    cause = " ".join(line for line in lines if not line.startswith("\t"))
    if "ip" in facts:
        cause = f"{cause} (node {facts['ip']})"
    return WorkerLostError(role or facts.get("class_name", "an actor"), cause)
