"""The frozen ends of the target that a trainer needs: its embedding and its output head.

Shapes: ``T`` and ``N`` rows, ``H`` the target's hidden size, ``V`` its vocabulary, ``Vd`` the
draft's.
"""

import json
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from torchspec_lib.errors import ConfigError
from torchspec_lib.target import TargetSpec

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

_MAX_LOGITS = 1 << 28
"""Full-vocabulary logits held at a time: 512 MiB in bf16."""


def load_tensor(folder: Path, name: str) -> Tensor:
    """Read one tensor of a model in safetensors, sharded or not, and nothing else of it.

    Raises:
        ConfigError: No file of the folder holds it.
    """
    with safe_open(_file_of(folder, name), framework="pt") as tensors:
        names = tensors.keys()
        if name not in names:
            raise _missing(folder, name)
        tensor: Tensor = tensors.get_tensor(name)
        return tensor


class TargetHead(nn.Module):
    """The target's embedding and lm_head, and the draft's share of its vocabulary."""

    draft_ids_V: Tensor
    """Of each target id, the row of the draft's head; -1 where it has none."""
    _kept_Vd: Tensor

    def __init__(
        self, embed_VH: Tensor, lm_head_VH: Tensor, draft_vocab: npt.NDArray[np.int64] | None
    ) -> None:
        """``draft_vocab``: ascending target ids, [Vd]; None if it is the whole vocabulary."""
        super().__init__()
        self.embed_VH = nn.Parameter(embed_VH, requires_grad=False)
        tied = lm_head_VH is embed_VH
        self.lm_head_VH = self.embed_VH if tied else nn.Parameter(lm_head_VH, requires_grad=False)
        vocab_size = len(lm_head_VH)
        self._is_whole = draft_vocab is None
        kept = np.arange(vocab_size) if draft_vocab is None else draft_vocab.astype(np.int64)
        kept_Vd = torch.from_numpy(kept)
        draft_ids_V = torch.full((vocab_size,), -1)
        draft_ids_V[kept_Vd] = torch.arange(len(kept_Vd))
        self.register_buffer("draft_ids_V", draft_ids_V)
        self.register_buffer("_kept_Vd", kept_Vd)

    @classmethod
    def load(
        cls,
        target: TargetSpec,
        draft_vocab: npt.NDArray[np.int64] | None,
        dtype: torch.dtype,
    ) -> Self:
        """Read the two tensors (one if they are tied) from the target's folder.

        Raises:
            ConfigError: The folder lacks one, or it isn't of the target's sizes.
        """
        folder, shape = Path(target.path), (target.vocab_size, target.hidden_size)
        embed_VH = _load_rows(folder, EMBEDDING, shape).to(dtype)
        if target.tie_word_embeddings:
            return cls(embed_VH, embed_VH, draft_vocab)
        return cls(embed_VH, _load_rows(folder, LM_HEAD, shape).to(dtype), draft_vocab)

    @property
    def draft_rows_VdH(self) -> Tensor:
        """The output head's rows for the draft vocabulary; a copy where that isn't the whole.

        Gathered anew each time: it takes a thousandth of a step, and no memory at its peak.
        """
        return self.lm_head_VH if self._is_whole else self.lm_head_VH[self._kept_Vd]

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., H] of target token ids."""
        return F.embedding(ids, self.embed_VH)

    @torch.no_grad()
    def target_ids(self, last_TH: Tensor) -> Tensor:
        """The target's greedy next token after each state, int64 [T]."""
        rows = max(1, _MAX_LOGITS // len(self.lm_head_VH))
        chunks = last_TH.to(self.lm_head_VH.dtype).split(rows)
        return torch.cat([F.linear(chunk, self.lm_head_VH).argmax(-1) for chunk in chunks])

    @torch.no_grad()
    def knows_choices(self, last_NH: Tensor) -> Tensor:
        """Whether the draft vocabulary holds the target's greedy next token, bool [N]."""
        if self._is_whole:
            return torch.ones(len(last_NH), dtype=torch.bool, device=last_NH.device)
        return self.draft_ids_V[self.target_ids(last_NH)] >= 0

    @torch.no_grad()
    def teacher_logits(self, last_NH: Tensor) -> Tensor:
        """The target's logits over the draft vocabulary, [N, Vd]."""
        return F.linear(last_NH.to(self.lm_head_VH.dtype), self.draft_rows_VdH)


def _load_rows(folder: Path, name: str, shape: tuple[int, int]) -> Tensor:
    tensor = load_tensor(folder, name)
    if tuple(tensor.shape) != shape:
        raise ConfigError(
            "model.target",
            f"{name} in {folder} has shape {list(tensor.shape)}, its config says {list(shape)}",
            "The folder's weights and config.json don't belong together",
        )
    return tensor


def _file_of(folder: Path, name: str) -> Path:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        shard = json.loads(index.read_text())["weight_map"].get(name)
        if shard is None:
            raise _missing(folder, name)
        return folder / str(shard)
    if not single.is_file():
        raise _missing(folder, name)
    return single


def _missing(folder: Path, name: str) -> ConfigError:
    return ConfigError(
        "model.target",
        f"{folder} holds no tensor {name} in safetensors files",
        "Only decoder models with Llama's tensor names, saved as safetensors, are supported",
    )
