"""Reads conversations from JSON, JSONL, Parquet and Hugging Face data sets, and checks each.

Cheap to import and to run: neither torch nor transformers, so that a broken line is
refused before anything is loaded.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchspec_lib.config.settings import find_path
from torchspec_lib.data.messages import Message, parse_message, parse_tools
from torchspec_lib.errors import ConfigError, DataError

Rows = Iterator[tuple[str, Any]]
"""Where a row stands, ``prompts.jsonl:17``, and what stands there."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with an answer, or that ask for one.

    Example:
        ``Conversation("prompts.jsonl:17", (Message("user", "Hi"), Message("assistant", "Hello")),
        source_id="chat-0017")``
    """

    where: str
    """File and line or row, for error messages."""
    messages: tuple[Message, ...]
    source_id: str | None
    """The row's own ``id``, where it has one."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of what the assistant may call."""
    category: str | None = None
    """The row's own ``category``, as benchmarks have one."""

    @property
    def is_answered(self) -> bool:
        return any(message.role == "assistant" for message in self.messages)


@dataclass(frozen=True, slots=True)
class Source:
    """A file or a pinned revision of a Hugging Face data set."""

    name: str
    """As the user wrote it."""
    split: str
    path: Path | None
    """None for a Hugging Face data set."""
    revision: str
    """The data set's commit; empty for a file."""

    def digest(self) -> str:
        """Identifies the content: sha256 of a file's bytes, or data set, commit and split."""
        if self.path is None:
            return f"{self.name}@{self.revision}#{self.split}"
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def conversations(self, answered: bool = True) -> Iterator[Conversation]:
        """All conversations, in order; if ``answered``, each must have an answer of its own.

        Raises:
            DataError: A row is no conversation, or there is none at all.
        """
        is_empty = True
        for where, row in self._rows():
            is_empty = False
            yield _parse(row, where, answered)
        if is_empty:
            raise DataError(self.name, "holds no conversation", "Add some, or leave it out")

    def _rows(self) -> Rows:
        if self.path is None:
            return _read_hub(self.name, self.split, self.revision)
        return READERS[self.path.suffix](self.path, self.name)


def open_source(source: str, split: str, key: str) -> Source:
    """Find a file, or else a Hugging Face data set and its current revision.

    Args:
        source: A path ending in .json, .jsonl or .parquet, or a data set id.
        split: Which split of a Hugging Face data set to read.
        key: The setting that names the source, such as ``data.train[0]``.

    Raises:
        ConfigError: There is no such file, and no such data set can be reached.
        DataError: The file's format isn't known by its suffix.
    """
    try:
        path = find_path(source, key)
    except ConfigError:
        if Path(source).suffix in READERS:
            raise
        return Source(source, split, path=None, revision=_hub_revision(source, key))
    if path.suffix not in READERS or path.is_dir():
        kind = "a folder" if path.is_dir() else f"a {path.suffix or 'file without suffix'}"
        raise DataError(
            source, f"is {kind}, not {', '.join(READERS)}", "Convert it, or name another file"
        )
    return Source(source, split, path=path, revision="")


def _read_jsonl(path: Path, name: str) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{name}:{number}", _decode(line, f"{name}:{number}")


def _read_json(path: Path, name: str) -> Rows:
    """One array of rows, or as in JSONL a row per line."""
    with path.open("rb") as file:
        is_array = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not is_array:
        yield from _read_jsonl(path, name)
        return
    rows = _decode(path.read_bytes(), name)
    for number, row in enumerate(rows, start=1):
        yield f"{name} row {number}", row


def _decode(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise DataError(
            where,
            f"is not valid JSON: {error.msg} at {line}column {error.colno}",
            "Correct or remove it",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(where, f"is not UTF-8: {error.reason}", "Save it as UTF-8") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        problem = f"is more than Python's json reads: {error}"
        raise DataError(where, problem, "Correct or remove it") from error


def _read_parquet(path: Path, name: str) -> Rows:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name} row {number}", row
    except pa.ArrowException as error:
        raise DataError(name, f"is not readable as Parquet: {error}", "Write it anew") from error


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _hub_revision(source: str, key: str) -> str:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
    )

    try:
        return str(HfApi().dataset_info(source, timeout=10).sha)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise ConfigError(
            key,
            f"{source!r} is no file here, and Hugging Face has no such data set or can't be "
            f"reached ({type(error).__name__})",
            "Correct it, or log in with HF_TOKEN if the data set is gated",
        ) from error


def _read_hub(name: str, split: str, revision: str) -> Rows:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split, revision=revision, streaming=True)
    except ValueError as error:  # also what an unknown split and a needed config name raise
        raise ConfigError("data.split", f"can't read {name}: {error}", "Correct it") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}[{split}] row {number}", row


def _parse(row: Any, where: str, answered: bool) -> Conversation:
    if not isinstance(row, dict):
        raise DataError(
            where, f"is a {type(row).__name__}, not an object", 'Write {"messages": [...]}'
        )
    turns = row.get("messages") or row.get("conversations") or _as_turns(row)
    if not isinstance(turns, list):
        raise DataError(
            where,
            "has neither a list 'messages' nor a list 'conversations'"
            f" (its keys: {', '.join(row) or 'none'})",
            'Write {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    messages = [parse_message(turn, f"{where}, message {i}") for i, turn in enumerate(turns)]
    if row.get("system"):  # ShareGPT has it beside the messages
        system = parse_message({"role": "system", "content": row["system"]}, f"{where}, system")
        messages = [system, *messages]
    # An empty system prompt is none.
    messages = [message for message in messages if message.role != "system" or message.content]
    source_id = row.get("id")
    conversation = Conversation(
        where,
        tuple(messages),
        None if source_id is None else str(source_id),
        parse_tools(row.get("tools"), where),
        None if row.get("category") is None else str(row["category"]),
    )
    if not any(message.role in ("user", "assistant") for message in messages):
        raise DataError(where, "holds no message of a user", "Add one, or remove the row")
    if answered and not conversation.is_answered:
        raise DataError(
            where,
            "has no assistant turn to learn from",
            "Add one, remove the row, or have the target answer: regeneration.enabled",
        )
    return conversation


def _as_turns(row: dict[str, Any]) -> Any:
    """The messages of a raw ``prompt``, or the first of the questions in ``turns``."""
    turns = row.get("turns")
    prompt = turns[0] if isinstance(turns, list) and turns else row.get("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return row.get("messages", row.get("conversations"))
