"""What a night's training is made of: the conversations that arrived, the champion to start from.

A night goes on where the champion's conversations end, not where the last night did: what went
into a draft that wasn't good enough, or into a night that failed, is trained on again.
"""

import logging
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import find_path
from torchspec_lib.data.conversations import READERS
from torchspec_lib.errors import ConfigError
from torchspec_lib.registry import registry
from torchspec_lib.target import read_target

_DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""Of Hugging Face: a relative path of at most two parts, where there is no such folder."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Night:
    """A night's run."""

    run: RunConfig
    since: datetime | None
    """Where the champion's conversations end; None where there is no champion of another night."""
    num_files: int
    """Files with new conversations."""


def plan_night(run: RunConfig, kickoff: datetime) -> Night:
    """Turn a standing configuration into tonight's.

    Folders in ``data.train`` become the files in them that were last written after the
    champion's conversations end and until ``kickoff``; everything else stays. The draft starts
    from the champion, and is registered only if it is better.

    Args:
        run: The standing configuration.
        kickoff: When the night begins, with a time zone.

    Raises:
        ConfigError: A folder doesn't exist, or the champion is a draft for another target.
    """
    target = read_target(run.model)
    best = registry.champion(run, target)
    since = None if best is None else best.prompts_until
    train, num_new = [], 0
    for index, source in enumerate(run.data.train):
        arrived = _arrived(source, f"data.train[{index}]", since, kickoff)
        num_new += len(arrived or ())
        train += [source] if arrived is None else arrived
    if num_new == 0:
        return Night(run, since, 0)
    start = None if best is None else str(registry.champion_files(run, best))
    training = run.training.model_copy(update={"continual_from": start})
    noted = {"only_better": True, "prompts_until": kickoff}
    tonight = run.model_copy(
        update={
            "data": run.data.model_copy(update={"train": tuple(train)}),
            "training": training if start else run.training,
            "registry": run.registry.model_copy(update=noted),
        }
    )
    logger.info("event=night files=%d since=%s champion=%s", num_new, since, start)
    return Night(tonight, since, num_new)


def _arrived(source: str, key: str, since: datetime | None, until: datetime) -> list[str] | None:
    """The new files of a folder, by name; None for what isn't one."""
    if Path(source).suffix in READERS:
        return None
    try:
        folder = find_path(source, key)
    except ConfigError:
        if _DATASET_ID.fullmatch(source):
            return None
        raise
    files = sorted(path for path in folder.rglob("*") if path.suffix in READERS)
    return [str(path) for path in files if _is_new(_written(path), since, until)]


def _is_new(written: datetime, since: datetime | None, until: datetime) -> bool:
    return written <= until and (since is None or written > since)


def _written(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
