"""Checkpoints as files: how they are named, described, verified, removed and chosen.

``step_000123/`` holds the tensors' files and ``meta.json``, which has every file's size and
hash, and its own. What ends in ``.tmp`` was never finished or is being removed, what ends in
``.damaged`` was set aside: neither is a checkpoint. Without torch: the driver reads them too.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torchspec_lib.errors import CheckpointError
from torchspec_lib.run_folder import checkpoint_mark

logger = logging.getLogger(__name__)

FORMAT = 2
META = "meta.json"
UNFINISHED = ".tmp"

MEND_DAMAGE = (
    "Set recovery.on_damaged_checkpoint: use_older to go on from an older one, "
    "or fresh: true to start over"
)
START_OVER = "Put it back, or set fresh: true to start over"

_NAME = re.compile(r"step_(\d+)")
_DIGEST = "sha256"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` is, or will be."""
    return folder / f"step_{step:06d}"


def finished(folder: Path) -> list[Path]:
    """All checkpoints in ``folder``, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``; one that was never finished isn't one."""
    found = finished(folder)
    return found[-1] if found else None


def last_step(folder: Path) -> int:
    """The step that the newest checkpoint was made after; 0 where there is none."""
    path = latest(folder)
    return 0 if path is None else int(path.name.removeprefix("step_"))


def resume_point(folder: Path, on_damaged: Literal["fail", "use_older"]) -> Path | None:
    """The checkpoint that a run goes on from; None if it never made one.

    Args:
        folder: The run's checkpoints.
        on_damaged: ``fail`` gives the newest, which is verified when it is loaded.
            ``use_older`` verifies them from the newest on, and sets damaged ones aside.

    Raises:
        CheckpointError: The run made checkpoints, and none of them is there and whole; or,
            with ``use_older``, one was written by another version.
    """
    found = finished(folder)
    if not found:
        _check_none_was_made(folder)
        return None
    if on_damaged == "fail":
        return found[-1]
    damaged: list[tuple[Path, str]] = []
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            _set_aside(damaged, path)
            return path
        damaged.append((path, problem))
    problems = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
    raise CheckpointError(str(folder), f"none of them is whole: {problems}", START_OVER)


def _check_none_was_made(folder: Path) -> None:
    mark = checkpoint_mark(folder)
    if mark.exists():
        raise CheckpointError(
            str(folder), f"there is none, but {mark.name} beside it says that there was", START_OVER
        )


def _set_aside(damaged: list[tuple[Path, str]], usable: Path) -> None:
    for path, problem in damaged:
        aside, number = path.with_suffix(".damaged"), 1
        while aside.exists():
            number += 1
            aside = path.with_suffix(f".damaged{number}")
        path.rename(aside)
        logger.warning(
            "event=damaged_checkpoint checkpoint=%s problem=%r kept_as=%s resuming_from=%s",
            path,
            problem,
            aside.name,
            usable.name,
        )


def position(path: Path | None) -> tuple[int, dict[str, Any] | None]:
    """The step that a checkpoint was made after, and the accounts at that time.

    Returns:
        ``(0, None)`` for no checkpoint.

    Raises:
        CheckpointError: Its description is missing or damaged, or of another version.
    """
    if path is None:
        return 0, None
    meta = read_meta(path)
    return meta["step"], meta["ledger"]


def write_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Describe a checkpoint, and force the description to the disk."""
    content = json.loads(json.dumps(meta))
    write_durably(path / META, json.dumps({**content, _DIGEST: _digest(content)}, indent=1))
    sync_folder(path)


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's description.

    Raises:
        CheckpointError: It is missing or damaged, or of another version.
    """
    meta, problem = _read_meta(path)
    if problem is not None:
        raise CheckpointError(str(path), problem, MEND_DAMAGE)
    return meta


def _read_meta(path: Path) -> tuple[dict[str, Any], str | None]:
    """The description, or what damages it."""
    try:
        meta = dict(json.loads((path / META).read_text()))
    except (OSError, ValueError, TypeError) as error:
        return {}, f"{META} can't be read ({error})"
    digest = meta.pop(_DIGEST, None)
    is_intact = digest == _digest(meta)
    if meta.get("format") != FORMAT and (is_intact or digest is None):
        raise CheckpointError(
            str(path),
            f"its format is {meta.get('format')!r}, this version reads {FORMAT}",
            "Go on with the version that wrote it, or set fresh: true to start over",
        )
    return meta, None if is_intact else f"{META} has other content than was written"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damage(path: Path) -> str | None:
    """What of a checkpoint isn't as it was written, in words; reads all of it.

    Raises:
        CheckpointError: It was written by another version.
    """
    meta, problem = _read_meta(path)
    return problem or differences(path, meta["files"])


def differences(folder: Path, files: Mapping[str, Any], *, sizes_only: bool = False) -> str | None:
    """Which of ``files`` aren't as they were written, in words."""
    problems = []
    for name, (num_bytes, digest) in files.items():
        found = folder / name
        if not found.is_file():
            problems.append(f"{name} is missing")
        elif found.stat().st_size != num_bytes:
            problems.append(f"{name} has {found.stat().st_size:,} bytes instead of {num_bytes:,}")
        elif not sizes_only and hashes(folder, name)[name][1] != digest:
            problems.append(f"{name} has other content than was written")
    return "; ".join(problems) or None


def hashes(folder: Path, pattern: str) -> dict[str, Any]:
    """``{name: [bytes, sha256]}`` of the files that match."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as file:
            found[path.name] = [
                path.stat().st_size,
                hashlib.file_digest(file, "sha256").hexdigest(),
            ]
    return found


def publish(partial: Path, final: Path) -> None:
    """Give a finished checkpoint its name, and note beside the folder that there are some."""
    mark = checkpoint_mark(final.parent)
    noted = mark.with_suffix(UNFINISHED)
    # Written before the rename: after it, a full disk must not fail a checkpoint that is there.
    write_durably(noted, json.dumps({"newest": final.name}))
    if final.exists():
        # Its writer was given up for dead and wrote on, after this one had resumed.
        remove(final)
    partial.rename(final)
    sync_folder(final.parent)
    noted.replace(mark)


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep``, the best by accept length, and what is damaged."""
    lengths = {}
    for path in finished(folder):
        meta, problem = _read_meta(path)
        if problem is None:
            lengths[path] = (meta["accept_length"], meta["step"])
    best = max(lengths, key=lambda path: lengths[path])
    for path in list(lengths)[:-keep]:
        if path != best:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint; half removed, it doesn't look like one."""
    doomed = path.with_suffix(f".old{UNFINISHED}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> None:
    """Remove what a writer that died has left."""
    for leftover in folder.glob(f"*{UNFINISHED}"):
        shutil.rmtree(leftover)


def write_durably(path: Path, text: str) -> None:
    """Write a file, and force it to the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
