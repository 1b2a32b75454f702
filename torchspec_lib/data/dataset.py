"""Prepares a data set once for all runs that need the same, and reads it.

A data set lies under the hash of everything that it was made from, so that an unchanged rerun
finds it and changed content doesn't. It is written beside its place and then renamed: it is
whole or it isn't there.
"""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.conversations import Conversation, Source
from torchspec_lib.data.selection import HeldoutPrompt, Selection
from torchspec_lib.data.sources import Sources
from torchspec_lib.data.vocab import choose_draft_vocab, inherited_vocab
from torchspec_lib.errors import ConfigError, DataError
from torchspec_lib.results import DatasetManifest
from torchspec_lib.target import TargetSpec
from torchspec_lib.types import Prompt

MANIFEST, VOCAB = "manifest.json", "vocab.json"
PROMPTS, HELDOUT = "prompts.parquet", "heldout.parquet"
ROW_GROUP_SIZE = 128
"""Prompts that are decoded together when one of them is asked for."""
CACHED_ROW_GROUPS = 32

PROMPT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("num_tokens", pa.int32()),
        ("source", pa.string()),
    ]
)
HELDOUT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("reference", pa.string()),
    ]
)

logger = logging.getLogger(__name__)


def prepare_dataset(run: RunConfig, target: TargetSpec) -> tuple[DatasetManifest, Path]:
    """Tokenize ``run.data`` for ``target``, or find it done.

    Returns:
        The manifest, and the folder ``<data_root>/datasets/<dataset_id>`` that holds the data.

    Raises:
        ConfigError: A source doesn't exist, or the tokenizer or the draft's vocabulary doesn't fit.
        DataError: A conversation is broken, or none is usable; the message names the place.
    """
    if (run.draft.vocab_size or 0) > target.vocab_size:
        raise ConfigError(
            "draft.vocab_size",
            f"{run.draft.vocab_size} exceeds the target's {target.vocab_size} tokens",
            "Lower it, or leave it out for all tokens",
        )
    sources = Sources.open(run.data)
    dataset_id = sources.dataset_id(run, target)
    folder = run.data_path / "datasets" / dataset_id
    if not (folder / MANIFEST).is_file():
        sources = sources.answered(run, target)
        sources.check_files()
        staging = folder.with_name(f".{dataset_id}-{os.getpid()}-{secrets.token_hex(4)}")
        staging.mkdir(parents=True)
        try:
            _write(staging, run, target, sources, dataset_id)
            _publish(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    manifest = DatasetManifest.model_validate_json((folder / MANIFEST).read_text())
    logger.info(
        "dataset id=%s prompts=%d heldout=%d",
        dataset_id,
        manifest.num_prompts,
        manifest.num_heldout,
    )
    return manifest, folder


class Prompts:
    """The prompts of a prepared data set, read from disk as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = np.cumsum(sizes)
        """Index after the last prompt of each row group."""
        self._row_group = lru_cache(CACHED_ROW_GROUPS)(self._file.read_row_group)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        group = int(np.searchsorted(self._ends, index, side="right"))
        table = self._row_group(group)
        row = index - int(self._ends[group]) + table.num_rows
        return Prompt(
            table["prompt_id"][row].as_py(),
            table["token_ids"][row].values.to_numpy(),
            table["loss_mask"][row].values.to_numpy(zero_copy_only=False),
        )

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    @property
    def ids(self) -> list[str]:
        ids: list[str] = self._column("prompt_id").to_pylist()
        return ids

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each prompt."""
        lengths: npt.NDArray[np.int32] = self._column("num_tokens").to_numpy()
        return lengths

    def _column(self, name: str) -> Any:
        return self._file.read(columns=[name])[name]


def load_prompts(folder: Path) -> Prompts:
    """The training prompts of a prepared data set; cheap however many there are."""
    return Prompts(folder / PROMPTS)


def load_heldout(folder: Path) -> list[HeldoutPrompt]:
    """The held-out prompts of a prepared data set."""
    rows = pq.read_table(folder / HELDOUT).to_pylist()
    return [
        HeldoutPrompt(
            row["prompt_id"],
            np.array(row["prompt_token_ids"], dtype=np.int32),
            row["text"],
            row["reference"],
        )
        for row in rows
    ]


def load_draft_vocab(folder: Path) -> npt.NDArray[np.int64] | None:
    """[Vd] target ids, ascending; None where the draft has the target's whole vocabulary."""
    path = folder / VOCAB
    if not path.is_file():
        return None
    return np.array(json.loads(path.read_text())["draft_to_target"], dtype=np.int64)


def _write(
    folder: Path, run: RunConfig, target: TargetSpec, sources: Sources, dataset_id: str
) -> None:
    chat = ChatTokenizer.load(
        target.path,
        run.model.trust_remote_code,
        run.data.chat_template_kwargs,
        run.data.last_turn_only,
    )
    selection = Selection(chat, run.data, target.vocab_size)
    heldout = selection.heldout(_read(sources.heldout, "held-out", answered=False))
    num_heldout = _write_rows(folder / HELDOUT, HELDOUT_SCHEMA, map(_heldout_row, heldout))
    prompts = islice(selection.prompts(_read(sources.train, "train")), run.data.max_prompts)
    num_prompts = _write_rows(folder / PROMPTS, PROMPT_SCHEMA, map(_prompt_row, prompts))
    for field, count in (("train", num_prompts), ("heldout", num_heldout)):
        if count == 0:
            raise DataError(
                f"data.{field}",
                f"no conversation is usable; rejected: {dict(selection.rejected)}"
                + (f"; the first: {selection.first_unfit}" if selection.first_unfit else ""),
                "Add conversations, or change data.max_length or data.min_loss_tokens",
            )
    if not selection.end_of_turn_ids():
        logger.warning("no special token ends an answer: the draft won't learn where to stop")
    manifest = DatasetManifest(
        dataset_id=dataset_id,
        num_prompts=num_prompts,
        num_heldout=num_heldout,
        num_tokens=selection.num_tokens,
        num_loss_tokens=int(selection.token_counts.sum()),
        longest=selection.longest,
        turns=dict(selection.turns),
        rejected=dict(sorted(selection.rejected.items())),
        draft_vocab_size=run.draft.vocab_size or target.vocab_size,
        vocab_coverage=_write_vocab(folder / VOCAB, run, selection, target),
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def _read(sources: Iterable[Source], what: str, answered: bool = True) -> Iterable[Conversation]:
    conversations = chain.from_iterable(source.conversations(answered) for source in sources)
    return tqdm(conversations, f"tokenizing {what}", unit=" conversations", mininterval=1.0)


def _write_rows(path: Path, schema: pa.Schema, rows: Iterator[Mapping[str, Any]]) -> int:
    num_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(rows, ROW_GROUP_SIZE)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            num_rows += len(batch)
    return num_rows


def _prompt_row(prompt_and_source: tuple[Prompt, str]) -> dict[str, Any]:
    prompt, source = prompt_and_source
    return {
        "prompt_id": prompt.prompt_id,
        "token_ids": prompt.token_ids,
        "loss_mask": prompt.loss_mask,
        "num_tokens": prompt.num_tokens,
        "source": source,
    }


def _heldout_row(prompt: HeldoutPrompt) -> dict[str, Any]:
    return {name: getattr(prompt, name) for name in HELDOUT_SCHEMA.names}


def _write_vocab(path: Path, run: RunConfig, selection: Selection, target: TargetSpec) -> float:
    """Write the draft vocabulary if it is pruned; returns the share of tokens it covers."""
    counts, size = selection.token_counts, run.draft.vocab_size
    if size is None or size == len(counts):
        return 1.0
    draft_vocab = inherited_vocab(run)
    if draft_vocab is None:
        always_in = selection.end_of_turn_ids() | set(target.eos_token_ids)
        draft_vocab = choose_draft_vocab(counts, size, always_in)
    path.write_text(json.dumps({"draft_to_target": draft_vocab.tolist()}))
    return float(counts[draft_vocab].sum() / counts.sum())


def _publish(staging: Path, folder: Path) -> None:
    try:
        staging.rename(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():  # else another process has just made the same
            raise
