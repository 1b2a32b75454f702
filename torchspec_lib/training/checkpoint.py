"""Checkpoints from which a run goes on exactly as if it had never stopped.

``step_000123/`` holds DCP's shards (weights, optimizer moments, every rank's random state)
and ``meta.json``, written last: step, schedule, accounts, what the run was made of, and every
file's size and hash. A checkpoint is made under another name and renamed: it is whole or it
isn't there. One that can't be loaded is an error, never an absent one.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchspec_lib.config import RunConfig
from torchspec_lib.errors import CheckpointError
from torchspec_lib.target import TargetSpec

FORMAT = 1
META = "meta.json"

_NAME = re.compile(r"step_(\d+)")
_FRESH = "Resume from an older checkpoint by removing this one, or start over with fresh: true"
_MISSING = "nothing"
_NOT_IN_IDENTITY = {
    "training_num_nodes",
    "training_num_gpus_per_node",
    "micro_batch_tokens",
    "prefetch_steps",
    "checkpoint_interval",
    "keep_checkpoints",
}


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a step changes."""

    model: nn.Module
    """Sharded by FSDP."""
    optimizer: Optimizer
    scheduler: LRScheduler


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``; one that was never finished isn't one."""
    found = _finished(folder)
    return found[-1] if found else None


def position(path: Path | None) -> tuple[int, dict[str, Any] | None]:
    """The step that a checkpoint was made after, and the accounts at that time.

    Returns:
        ``(0, None)`` for no checkpoint.

    Raises:
        CheckpointError: Its description is missing or broken.
    """
    if path is None:
        return 0, None
    meta = _read_meta(path)
    return meta["step"], meta["ledger"]


def run_identity(run: RunConfig, target: TargetSpec, dataset_id: str) -> dict[str, Any]:
    """What a training state depends on: all but the number of ranks and what only costs time."""
    return {
        "data": dataset_id,
        "model": {"target": target.fingerprint, "dtype": run.model.dtype},
        "draft": run.draft.model_dump(),
        "training": run.training.model_dump(exclude=_NOT_IN_IDENTITY),
        "seed": run.seed,
    }


class CheckpointFolder:
    """A run's checkpoints, the newest few of them. All ranks call it together."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], interval: int, keep: int) -> None:
        """Use ``folder``, which every rank must see.

        Args:
            folder: Made if need be.
            identity: What a state depends on, nested and JSON-able. A checkpoint of another
                run is told by it.
            interval: Steps between checkpoints.
            keep: Newest checkpoints that stay.
        """
        self._folder, self._interval, self._keep = folder, interval, keep
        self._identity = _flatten(identity)

    def is_due(self, step: int) -> bool:
        return step % self._interval == 0

    def save(self, state: TrainingState, step: int, ledger: Mapping[str, Any] | None) -> Path:
        """Save the state after ``step``; ``ledger`` is rank 0's to give.

        Raises:
            CheckpointError: The ranks don't see each other's files in ``folder``.
        """
        final = self._folder / f"step_{step:06d}"
        partial = final.with_suffix(".tmp")
        is_first = dist.get_rank() == 0
        if is_first:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob("*.tmp"):
                shutil.rmtree(leftover)
            partial.mkdir()
        dist.barrier()
        dcp.save(_tensors(state), checkpoint_id=partial)
        own = _hashes(partial, f"__{dist.get_rank()}_*.distcp")
        gathered: list[dict[str, Any]] | None = [{}] * dist.get_world_size() if is_first else None
        dist.gather_object(own, gathered)
        if gathered is not None:
            files = _hashes(partial, ".metadata")
            for hashes in gathered:
                files |= hashes
            meta = {
                "format": FORMAT,
                "step": step,
                "world_size": dist.get_world_size(),
                "identity": self._identity,
                "scheduler": state.scheduler.state_dict(),
                "ledger": ledger,
                "files": files,
            }
            self._publish(partial, final, meta)
        dist.barrier()
        return final

    def _publish(self, partial: Path, final: Path, meta: Mapping[str, Any]) -> None:
        (partial / META).write_text(json.dumps(meta, indent=1))
        if problem := _damage(partial, _read_meta(partial)["files"], sizes_only=True):
            raise CheckpointError(
                str(final), problem, "Put data_root on a file system that all trainer nodes share"
            )
        if final.exists():
            replaced = final.with_suffix(".old.tmp")
            final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced)
        else:
            partial.rename(final)
        for old in _finished(self._folder)[: -self._keep]:
            shutil.rmtree(old)

    def load(self, path: Path, state: TrainingState) -> int:
        """Put ``state`` back as it was, on this or another number of ranks.

        Returns:
            The step after which it was saved.

        Raises:
            CheckpointError: It is damaged, or another run's; the message says what differs.
        """
        meta = _read_meta(path)
        self._check_identity(path, meta)
        _check_files(path, meta["files"])
        wanted = _tensors(state)
        if dist.get_rank() >= meta["world_size"]:
            del wanted["random"]  # a rank that didn't exist then
        try:
            dcp.load(wanted, checkpoint_id=path)
        except CheckpointException as error:
            causes = "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
            raise CheckpointError(str(path), f"its tensors don't fit: {causes}", _FRESH) from error
        set_state_dict(
            state.model,
            state.optimizer,
            model_state_dict=wanted["model"],
            optim_state_dict=wanted["optimizer"],
        )
        state.scheduler.load_state_dict(meta["scheduler"])
        if "random" in wanted:
            _set_random_state(wanted["random"][str(dist.get_rank())])
        step: int = meta["step"]
        return step

    def _check_identity(self, path: Path, meta: Mapping[str, Any]) -> None:
        saved, own = meta["identity"], self._identity
        differences = [
            f"{key} is {saved.get(key, _MISSING)!r} there and {own.get(key, _MISSING)!r} here"
            for key in sorted(saved.keys() | own.keys())
            if saved.get(key, _MISSING) != own.get(key, _MISSING)
        ]
        if differences:
            raise CheckpointError(
                str(path), f"it belongs to another run: {'; '.join(differences)}", _FRESH
            )


def _finished(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((path / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"{META} can't be read ({error})", _FRESH) from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            str(path), f"its format is {meta.get('format')!r}, this version reads {FORMAT}", _FRESH
        )
    return meta


def _tensors(state: TrainingState) -> dict[str, Any]:
    """What DCP saves, or fills in place; the random state under this rank's own name."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    random = {str(dist.get_rank()): _random_state()}
    return {"model": model, "optimizer": optimizer, "random": random}


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _hashes(folder: Path, pattern: str) -> dict[str, Any]:
    """``{name: [bytes, sha256]}`` of the files that match."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as file:
            found[path.name] = [
                path.stat().st_size,
                hashlib.file_digest(file, "sha256").hexdigest(),
            ]
    return found


def _check_files(path: Path, files: Mapping[str, Any]) -> None:
    """Every rank reads some of the files, and all learn of any damage."""
    names = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    own = _damage(path, {name: files[name] for name in names}, sizes_only=False)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, own)
    if found := [problem for problem in problems if problem]:
        raise CheckpointError(str(path), "; ".join(found), _FRESH)


def _damage(folder: Path, files: Mapping[str, Any], *, sizes_only: bool) -> str | None:
    """What isn't as it was written, in words."""
    problems = []
    for name, (num_bytes, digest) in files.items():
        found = folder / name
        if not found.is_file():
            problems.append(f"{name} is missing")
        elif found.stat().st_size != num_bytes:
            problems.append(f"{name} has {found.stat().st_size:,} bytes instead of {num_bytes:,}")
        elif not sizes_only and _hashes(folder, name)[name][1] != digest:
            problems.append(f"{name} has other content than was written")
    return "; ".join(problems) or None


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"training": {"betas": (0.9, 0.95)}}`` to ``{"training.betas": [0.9, 0.95]}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat
