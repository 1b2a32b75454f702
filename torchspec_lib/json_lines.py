"""Files of one JSON object a line that grow while a run goes on.

A kill may cut the last line off, and a full disk may cost some: a run goes on without them.
"""

import errno
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; none if it isn't there."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add lines behind the last whole one. Where there is no room for all, a warning says so."""
    lines = _lines(rows)
    try:
        with path.open("a+b", buffering=0) as file:
            end = _end_of_lines(file.fileno())
            file.truncate(end)
            if file.write(lines) < len(lines):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        logger.warning("event=not_noted file=%s cause=%s", path, error)


def replace(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file anew: whoever is killed meanwhile leaves the old one."""
    new = path.with_suffix(".tmp")
    new.write_bytes(_lines(rows))
    new.replace(path)


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _end_of_lines(file: int) -> int:
    """Where the last whole line of an open file ends."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return size
    return os.pread(file, size, 0).rfind(b"\n") + 1
