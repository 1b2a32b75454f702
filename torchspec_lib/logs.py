"""Logging, set up once per process: ``key=value`` events on stderr, role and rank in front."""

import logging
import sys


def setup(role: str, rank: int | None = None, level: int = logging.INFO) -> None:
    """Send this process's log lines to stderr. Calling it again replaces the first set-up."""
    name = role if rank is None else f"{role}-{rank}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger("torchspec_lib")
    root.handlers = [handler]
    root.setLevel(level)
    root.propagate = False
