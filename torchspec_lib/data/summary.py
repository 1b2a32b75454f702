"""What a prepared data set looks like, for people: its spread, and prompts as text."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchspec_lib.data.dataset import PROMPTS, load_draft_vocab
from torchspec_lib.types import Prompt

if TYPE_CHECKING:
    import pandas as pd


def summarize(folder: Path) -> "pd.DataFrame":
    """How the prompts are spread: count, mean, deviation and quantiles of what each one has.

    Returns:
        Columns ``num_tokens``, ``num_loss_tokens`` and, for a pruned draft vocabulary,
        ``vocab_coverage``: the share of a prompt's supervised tokens that lie in it.
    """
    import pandas as pd

    draft_vocab = load_draft_vocab(folder)
    parts = []
    with pq.ParquetFile(folder / PROMPTS, memory_map=True) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            lengths = table["num_tokens"].to_numpy()
            begins = np.cumsum(lengths) - lengths
            mask = pc.list_flatten(table["loss_mask"]).to_numpy()
            num_loss_tokens = np.add.reduceat(mask.astype(np.int64), begins)
            part = {"num_tokens": lengths, "num_loss_tokens": num_loss_tokens}
            if draft_vocab is not None:
                is_in = np.isin(pc.list_flatten(table["token_ids"]).to_numpy(), draft_vocab)
                covered = np.add.reduceat((mask & is_in).astype(np.int64), begins)
                part["vocab_coverage"] = covered / num_loss_tokens
            parts.append(pd.DataFrame(part))
    return pd.concat(parts).describe(percentiles=[0.05, 0.25, 0.5, 0.75, 0.95])


def decoded_spans(tokenizer: Any, prompt: Prompt) -> list[tuple[str, bool]]:
    """A prompt as text, cut where supervision begins and ends: (text, is supervised)."""
    cuts = np.flatnonzero(np.diff(prompt.loss_mask)) + 1
    begins = [0, *cuts.tolist()]
    ends = [*cuts.tolist(), prompt.num_tokens]
    return [
        (
            tokenizer.decode(prompt.token_ids[begin:end], clean_up_tokenization_spaces=False),
            bool(prompt.loss_mask[begin]),
        )
        for begin, end in zip(begins, ends, strict=True)
    ]
