"""Conversations that the target has answered itself: where they lie, and what is told of them.

They lie under the hash of everything that they depend on, shard by shard: an unchanged rerun finds
them, an interrupted one goes on behind the last shard. What answers them is ``regeneration``.
"""

import fcntl
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import Settings
from torchspec_lib.data.conversations import Conversation, Source
from torchspec_lib.errors import DataError
from torchspec_lib.target import TargetSpec

VERSION = 1
"""Raise it when the same input shall be answered otherwise."""


class RejectedAnswer(Settings):
    """A conversation that is left out, as an example of why."""

    where: str
    """Its place in the sources."""
    reason: str
    text: str
    """How the answer begins, or why nothing could be asked."""


class ShardReport(Settings):
    """How a shard of conversations was answered."""

    index: int
    num_conversations: int
    num_answered: int
    """Conversations that are kept, with all their answers."""
    answer_lengths: tuple[int, ...]
    """Tokens of each answer that is kept, its end of turn included."""
    num_generated: int
    """Tokens, those of rejected answers included."""
    rejected: dict[str, int]
    """Conversations by reason."""
    examples: tuple[RejectedAnswer, ...]
    """Some of them."""
    seconds: float
    """That an engine was at it."""


class RegeneratedAnswers(Settings):
    """All conversations, answered."""

    regeneration_id: str
    settings: dict[str, Any]
    """What the answers depend on: target, engine, template settings, sampling."""
    num_conversations: int
    num_answered: int
    num_answers: int
    num_tokens: int
    """Of the answers that are kept."""
    num_generated: int
    rejected: dict[str, int]
    engine_s: float
    """Of all engines together, their start left out."""

    @property
    def tokens_per_s(self) -> float:
        """That one engine generates."""
        return self.num_generated / self.engine_s if self.engine_s else 0.0


@dataclass(frozen=True, slots=True)
class RegeneratedFolder:
    """``<data_root>/regenerated/<id>/``.

    ``settings.json`` says what its answers depend on, ``shards/<i>.jsonl`` has the conversations
    and ``shards/<i>.json`` their ``ShardReport``, ``manifest.json`` is there once all are answered.
    """

    path: Path
    settings: dict[str, Any]

    @classmethod
    def of(cls, run: RunConfig, target: TargetSpec, digests: Sequence[str]) -> Self:
        """The folder of what these inputs give, and so no other. ``digests``: of ``data.train``.

        How many answers are computed together changes no more than their rounding, and is left
        out; the size of a shard says which conversations a file has.
        """
        settings = {
            "version": VERSION,
            "train": list(digests),
            "target": target.fingerprint,
            "dtype": run.model.dtype,
            **run.inference.decisive_settings,
            "chat_template_kwargs": run.data.chat_template_kwargs,
            "max_length": run.data.max_length,
            **run.regeneration.model_dump(mode="json", exclude={"enabled", "batch_size"}),
        }
        text = json.dumps(settings, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        return cls(run.data_path / "regenerated" / name, settings)

    @property
    def regeneration_id(self) -> str:
        return self.path.name

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Be the only one to write here, once others have finished. Makes the folder."""
        shards = self.path / "shards"
        shards.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_over in shards.glob(".*"):
                left_over.unlink(missing_ok=True)
            _write(self.path / "settings.json", json.dumps(self.settings, indent=2) + "\n")
            yield

    def has_shard(self, index: int) -> bool:
        return self._shard(index).is_file()

    def write_shard(self, report: ShardReport, rows: Sequence[dict[str, Any]]) -> None:
        """Add a shard: it is there with its report, or not at all."""
        path = self._shard(report.index)
        _write(path.with_suffix(".json"), report.model_dump_json(indent=2) + "\n")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        _write(path, "".join(lines))

    def reports(self) -> Iterator[ShardReport]:
        """Of the shards that are there, in their order."""
        for path in sorted((self.path / "shards").glob("*.jsonl")):
            yield ShardReport.model_validate_json(path.with_suffix(".json").read_text())

    def answers(self) -> RegeneratedAnswers | None:
        """What is told of the whole; None while it isn't finished."""
        path = self.path / "manifest.json"
        return RegeneratedAnswers.model_validate_json(path.read_text()) if path.is_file() else None

    def finish(self) -> RegeneratedAnswers:
        """Add the shards up: no more will come."""
        reports = list(self.reports())
        answers = RegeneratedAnswers(
            regeneration_id=self.regeneration_id,
            settings=self.settings,
            num_conversations=sum(report.num_conversations for report in reports),
            num_answered=sum(report.num_answered for report in reports),
            num_answers=sum(len(report.answer_lengths) for report in reports),
            num_tokens=sum(sum(report.answer_lengths) for report in reports),
            num_generated=sum(report.num_generated for report in reports),
            rejected=dict(sorted(sum((Counter(r.rejected) for r in reports), Counter()).items())),
            engine_s=sum(report.seconds for report in reports),
        )
        _write(self.path / "manifest.json", answers.model_dump_json(indent=2) + "\n")
        return answers

    def sources(self) -> tuple[Source, ...]:
        """The conversations, to be read like any others.

        Raises:
            DataError: They aren't all answered yet, or all answers were rejected.
        """
        answers = self.answers()
        if answers is None:
            raise DataError(
                "data.train",
                f"the target hasn't answered it yet ({self.path} has no manifest)",
                "Run the whole pipeline, or set regeneration.enabled to false",
            )
        if not answers.num_answered:
            raise DataError(
                "data.train",
                f"no answer of the target is usable; rejected: {answers.rejected}",
                f"Look at the examples in {self.path}/shards, and raise "
                "regeneration.max_new_tokens or data.max_length, or correct the conversations",
            )
        return tuple(self._source(report) for report in self.reports() if report.num_answered)

    def conversations(self, report: ShardReport) -> Iterator[Conversation]:
        """A shard's, as they were answered."""
        return self._source(report).conversations() if report.num_answered else iter(())

    def _source(self, report: ShardReport) -> Source:
        path = self._shard(report.index)
        return Source(path.name, split="", path=path, revision="")

    def _shard(self, index: int) -> Path:
        return self.path / "shards" / f"{index:06d}.jsonl"


def _write(path: Path, text: str) -> None:
    """Write a file that is whole, or isn't there, whatever happens meanwhile."""
    staging = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with staging.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)
