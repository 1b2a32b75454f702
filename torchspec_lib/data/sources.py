"""All sources of a data set together, and the data set's identity."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from torchspec_lib.config.models import DataConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.conversations import Source, open_source
from torchspec_lib.data.regenerated import RegeneratedFolder
from torchspec_lib.data.vocab import inherited_vocab
from torchspec_lib.target import TargetSpec

PREPARE_VERSION = 3
"""Raise it when the same input shall give another data set."""
TOKENIZER_PATTERNS = (
    *("*token*", "*.jinja", "chat_template.json", "vocab.*", "merges.txt", "*.model"),
    "tekken.json",
)
"""Files of a target's folder that decide about its token ids and its chat template."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the training and the held-out conversations come from."""

    train: tuple[Source, ...]
    heldout: tuple[Source, ...]

    @classmethod
    def open(cls, data: DataConfig) -> Self:
        """Find all of them.

        Raises:
            ConfigError: One doesn't exist.
            DataError: One has an unknown format.
        """
        return cls(
            _open("data.train", data.train, data.split),
            _open("data.heldout", data.heldout, data.split),
        )

    def check_files(self, answered: bool = True) -> None:
        """Read every file once, before anything is loaded: a broken line fails in no time.

        Args:
            answered: Whether those in ``train`` must have answers.

        Raises:
            DataError: A row is no conversation, or a file holds none.
        """
        for sources, must_be in ((self.train, answered), (self.heldout, False)):
            for source in sources:
                if source.path is not None:
                    for _ in source.conversations(must_be):
                        pass

    def answered(self, run: RunConfig, target: TargetSpec) -> Self:
        """With the target's own answers in ``train``, if the run is to have them.

        Raises:
            DataError: The target hasn't answered yet, or not usably.
        """
        folder = self.answers(run, target)
        return self if folder is None else replace(self, train=folder.sources())

    def answers(self, run: RunConfig, target: TargetSpec) -> RegeneratedFolder | None:
        """Where the target's own answers to ``train`` will lie, if the run is to have them."""
        if not run.regeneration.enabled:
            return None
        return RegeneratedFolder.of(run, target, [source.digest() for source in self.train])

    def dataset_id(self, run: RunConfig, target: TargetSpec) -> str:
        """16 hex digits over everything that the data set's content depends on."""
        identity = {
            "version": PREPARE_VERSION,
            "train": [source.digest() for source in self.train],
            "heldout": [source.digest() for source in self.heldout],
            "tokenizer": _digests(Path(target.path)),
            "target_vocab": [target.vocab_size, *target.eos_token_ids],
            "draft_vocab": run.draft.vocab_size,
            "max_length": run.data.max_length,
            "min_loss_tokens": run.data.min_loss_tokens,
            "max_prompts": run.data.max_prompts,
            "last_turn_only": run.data.last_turn_only,
            "chat_template_kwargs": run.data.chat_template_kwargs,
        }
        answers = self.answers(run, target)
        if answers is not None:
            identity["regeneration"] = answers.regeneration_id
        inherited = inherited_vocab(run)
        if inherited is not None:
            identity["inherited_vocab"] = hashlib.sha256(inherited.tobytes()).hexdigest()
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _open(key: str, names: Sequence[str], split: str) -> tuple[Source, ...]:
    return tuple(open_source(name, split, f"{key}[{i}]") for i, name in enumerate(names))


def _digests(target: Path) -> dict[str, str]:
    files = {path for pattern in TOKENIZER_PATTERNS for path in target.glob(pattern)}
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()
    }
