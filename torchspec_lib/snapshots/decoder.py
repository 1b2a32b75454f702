"""Decodes snapshots of a draft for real, in an actor of its own beside the training."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.dataset import load_prompts
from torchspec_lib.data.set_aside import question, set_aside
from torchspec_lib.errors import ConfigError, EngineError
from torchspec_lib.evaluation.acceptance import ChainCounts, accept_length, accept_rates
from torchspec_lib.evaluation.drafting import ChainDrafter
from torchspec_lib.evaluation.speculative import SpeculativeDecoder
from torchspec_lib.evaluation.verification import TargetChoice
from torchspec_lib.models.export import LoadedDraft, load_draft
from torchspec_lib.models.target_model import load_target
from torchspec_lib.ray.failures import get
from torchspec_lib.ray.ray_actor import RayActor
from torchspec_lib.ray.watchdog import Watchdog, wait_for
from torchspec_lib.results import SnapshotResult
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.target import TargetSpec
from torchspec_lib.types import Pulse, Recovery

NAME = "the decoder of snapshots"
GREEDY = 0.0


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """What a decoder of snapshots is built from."""

    run: RunConfig
    target: TargetSpec
    weight_bytes: int
    """The target's."""
    dataset_dir: str
    folder: RunFolder


class SnapshotDecoder(RayActor):
    """Holds the target, and decodes the prompts set aside with one snapshot after the other.

    Ready once constructed. ``pulse`` is answered while it decodes, given two threads.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        """Load the target.

        Raises:
            ConfigError: It doesn't fit beside what is on the GPU.
        """
        super().__init__("decoder", 0, spec.run.cluster.device)
        start = time.monotonic()
        self._spec = spec
        _check_room(spec, self.device)
        model = spec.run.model
        self._model = load_target(spec.target, model.dtype, self.device, model.trust_remote_code)
        self._questions = questions(spec.run, Path(spec.dataset_dir))
        self._num_decoded = 0
        if self.is_restarted:
            seconds = time.monotonic() - start
            spec.folder.append_recovery(Recovery(NAME, "its process died", seconds))

    def decode(self, step: int) -> SnapshotResult:
        """Decode with the snapshot of ``step``.

        Raises:
            DraftFormatError: It can't be read.
            EngineError: The decoding failed, such as for want of memory.
        """
        try:
            return self._decode(step)
        except RuntimeError as error:
            raise EngineError(NAME, f"{type(error).__name__}: {error}") from error

    def _decode(self, step: int) -> SnapshotResult:
        start = time.monotonic()
        decoder = snapshot_decoder(
            self._spec.run, self._model, load_draft(self._spec.folder.snapshot(step)), self.device
        )
        counts: list[ChainCounts] = []
        for token_ids in self._questions:
            counts.append(decoder.decode(token_ids, self._spec.target.eos_token_ids).counts)
            self._num_decoded += 1
        return SnapshotResult(
            step=step,
            accept_length=accept_length(counts),
            accept_rates=accept_rates(counts, self._spec.run.evaluation.draft_steps),
            num_prompts=len(counts),
            num_new_tokens=sum(count.num_new_tokens for count in counts),
            seconds=time.monotonic() - start,
        )

    def pulse(self) -> Pulse:
        """Something moves while prompts are decoded."""
        return Pulse(self._num_decoded, (f"{NAME}: {self._num_decoded} prompts decoded",))


def questions(run: RunConfig, dataset_dir: Path) -> list[Sequence[int]]:
    """The token ids of what is decoded: the prompts set aside, up to their last answers."""
    prompts = load_prompts(dataset_dir)
    chosen = set_aside(len(prompts), run.snapshots.num_set_aside, run.seed)
    return [question(prompts[int(index)]) for index in chosen]


def snapshot_decoder(
    run: RunConfig, model: nn.Module, loaded: LoadedDraft, device: torch.device
) -> SpeculativeDecoder:
    """Greedy decoding with chains, as long as the final evaluation's."""
    settings = run.evaluation
    draft, embed = loaded.draft.to(device), model.get_submodule("model.embed_tokens")
    drafter = ChainDrafter(draft, embed, loaded.draft_vocab, settings.draft_steps)
    choose = TargetChoice(GREEDY, settings.max_new_tokens)
    return SpeculativeDecoder(model, choose, loaded.config.aux_layer_ids, drafter)


def _check_room(spec: DecoderSpec, device: torch.device) -> None:
    if device.type != "cuda":
        return  # a machine's memory is checked before anything starts
    free, _ = torch.cuda.mem_get_info(device)
    if free < spec.weight_bytes:
        gib = 1 << 30
        raise ConfigError(
            "snapshots.interval_steps",
            f"snapshots are decoded with the target on a GPU that has {free / gib:.1f} GiB free, "
            f"and its weights alone have {spec.weight_bytes / gib:.1f} GiB",
            "Use cluster.placement separate, where the decoder has a GPU of its own, or leave it "
            "out",
        )


class DecoderClient:
    """A decoder's handle as what the selection asks for."""

    def __init__(self, handle: Any, hang_timeout_s: float) -> None:
        """``hang_timeout_s``: how long a prompt may take."""
        self._handle, self._hang_timeout_s = handle, hang_timeout_s

    def start(self, step: int) -> Any:
        return self._handle.decode.remote(step)

    def wait(self, call: Any) -> None:
        wait_for(call, Watchdog({NAME: self._handle}, self._hang_timeout_s))

    def result(self, call: Any) -> SnapshotResult:
        result: SnapshotResult = get(call, role=NAME)
        return result
