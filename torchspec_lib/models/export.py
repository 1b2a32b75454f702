"""The folder that SGLang and vLLM serve a draft from: written, and read back."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchspec_lib.errors import DraftFormatError
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.draft_files import CONFIG_FILE, WEIGHTS_FILE, read_draft
from torchspec_lib.models.eagle3 import Eagle3Draft
from torchspec_lib.models.validate import validate_draft


@dataclass(frozen=True, slots=True, eq=False)
class LoadedDraft:
    """A draft as an engine would load it: in the exported dtype, on the CPU, in eval mode."""

    draft: Eagle3Draft
    config: DraftModelConfig
    draft_vocab: npt.NDArray[np.int64] | None
    """Ascending target ids of the draft vocabulary, [Vd]; None if it is the target's whole."""


def save_draft(
    folder: Path,
    state_dict: Mapping[str, Tensor],
    config: DraftModelConfig,
    draft_vocab: npt.NDArray[np.int64] | None,
) -> None:
    """Export a draft; the folder appears whole and valid or not at all, and replaces an older one.

    Args:
        folder: Its parent is made if need be.
        state_dict: ``Eagle3Draft.state_dict()``, whole tensors of any float dtype.
        config: Its ``dtype`` is what the weights are written in.
        draft_vocab: Ascending target ids; required exactly if the vocabulary is pruned.

    Raises:
        DraftFormatError: The tensors or the vocabulary don't fit ``config``.
    """
    dtype = getattr(torch, config.dtype)
    tensors = {name: _plain(tensor, dtype) for name, tensor in state_dict.items()}
    if draft_vocab is not None and config.is_pruned:
        tensors |= _vocab_tensors(draft_vocab, config.vocab_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "draft"
        fresh.mkdir()
        save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        (fresh / CONFIG_FILE).write_text(json.dumps(config.to_serving_json(), indent=2) + "\n")
        try:
            validate_draft(fresh)  # what was written, not what was to be
        except DraftFormatError as error:
            raise DraftFormatError(str(folder), error.problems) from error
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        fresh.rename(folder)


def load_draft(folder: Path) -> LoadedDraft:
    """Read an exported draft.

    Raises:
        DraftFormatError: A file is missing or broken, or they contradict each other.
    """
    validate_draft(folder)
    files = read_draft(folder)
    config, tensors, draft_vocab = files.config, files.tensors, None
    if config.is_pruned:
        draft_vocab = (torch.arange(config.draft_vocab_size) + tensors.pop("d2t")).numpy()
        del tensors["t2d"]
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    draft.load_state_dict(tensors, assign=True)
    return LoadedDraft(draft.eval(), config, draft_vocab)


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _vocab_tensors(draft_vocab: npt.NDArray[np.int64], vocab_size: int) -> dict[str, Tensor]:
    target_ids = torch.from_numpy(draft_vocab.astype(np.int64))
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    return {"d2t": target_ids - torch.arange(len(target_ids)), "t2d": t2d}
