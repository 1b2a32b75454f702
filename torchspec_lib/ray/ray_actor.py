"""The base of every actor that works on a device."""

import logging
import os
import warnings
from typing import TYPE_CHECKING, Literal

import ray

from torchspec_lib import logs
from torchspec_lib.errors import DependencyError

if TYPE_CHECKING:
    import torch


class RayActor:
    """A device-bound actor: ready once constructed, on the GPU that Ray gave it.

    Ray shows an actor only its own GPUs, so that ``cuda:0`` is always the right one. INFO
    lines are for the driver; what an actor logs from WARNING up reaches the driver's terminal.
    """

    def __init__(self, role: str, rank: int, device: Literal["cuda", "cpu"]) -> None:
        """Set up logging and the device.

        Raises:
            DependencyError: ``device`` is ``cuda`` and torch sees no GPU here.
        """
        logs.setup(role, rank, logging.WARNING)
        self.node_ip: str = ray.util.get_node_ip_address()
        self.device = _use_device(device, self.node_ip)

    @property
    def is_restarted(self) -> bool:
        """Whether Ray has started this actor before, and lost it."""
        with warnings.catch_warnings():  # Ray calls a function of its own that it deprecates
            warnings.simplefilter("ignore")
            restarted: bool = ray.get_runtime_context().was_current_actor_reconstructed
        return restarted

    def ping(self) -> None:
        """Answers once the constructor is through, or with what it raised."""

    def exit(self) -> None:
        """End this actor's process after the calls before this one; ``atexit`` handlers run."""
        ray.actor.exit_actor()


def _use_device(device: Literal["cuda", "cpu"], node_ip: str) -> "torch.device":
    import torch

    os.environ["LOCAL_RANK"] = "0"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DependencyError(
            f"torch {torch.__version__} sees no CUDA device on node {node_ip}",
            "Install a CUDA build of torch and the NVIDIA driver there, "
            "or set cluster.device to cpu",
        )
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)
