"""EAGLE-3 (arXiv 2503.01840) under FSDP2.

Shapes: ``K`` depths of the training-time test, ``Vd`` draft vocabulary.
"""

import logging
import math
import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import ConfigError, UserError
from torchspec_lib.models.batch import PackedBatch, empty_batch
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.eagle3 import Eagle3Draft
from torchspec_lib.models.export import save_draft
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.models.ttt import Eagle3Model, Supervision, supervise
from torchspec_lib.target import TargetSpec
from torchspec_lib.training import continual
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.continual import DRAFT_PREFIX, FreshDraft
from torchspec_lib.training.device_copies import DeviceCopies
from torchspec_lib.training.fsdp import clip_gradients, parallelize, set_gradient_sync
from torchspec_lib.training.optimizer import build_optimizer, build_scheduler
from torchspec_lib.training.prefetch import PreparedStep
from torchspec_lib.training.snapshots import SaveDraft
from torchspec_lib.training.state import TrainingState
from torchspec_lib.training.trainer import Measure, Trainer
from torchspec_lib.types import StepMetrics

logger = logging.getLogger(__name__)


class Eagle3Trainer(Trainer):
    """A step doesn't depend on how its samples fall into micro-batches or onto ranks.

    Every loss is a sum over rows. The ranks first agree on each depth's denominator for the
    whole global batch; after that, gradients are sums of sums.
    """

    def __init__(
        self,
        run: RunConfig,
        target: TargetSpec,
        draft_vocab: npt.NDArray[np.int64] | None,
        num_steps: int,
        checkpoints: CheckpointFolder,
        device: torch.device,
    ) -> None:
        """Build a fresh draft, the same on every rank of the default process group.

        Args:
            run: The draft, the training and the seed.
            target: Its folder holds the embedding and the output head.
            draft_vocab: Ascending target ids, [Vd]; None for the target's whole vocabulary.
            num_steps: Of the whole run, for the learning rate's schedule.
            checkpoints: The run's.
            device: This rank's.

        Raises:
            ConfigError: The target's folder lacks what the trainer needs of it.
        """
        self._run, self._training, self._device = run, run.training, device
        self._target = target
        self._target_dtype = getattr(torch, run.model.dtype)
        self._draft_vocab = draft_vocab
        head = TargetHead.load(target, draft_vocab, self._target_dtype)
        self._config = DraftModelConfig.from_target(
            target, run.draft, len(head.draft_rows_VdH), run.model.dtype
        )
        draft = Eagle3Draft(self._config)
        draft.init_weights(head.draft_rows_VdH, torch.Generator().manual_seed(run.seed))
        draft.lm_head.requires_grad_(not run.draft.freeze_head)
        self._model = Eagle3Model(draft, run.draft.ttt_steps, run.training.loss)
        compute_dtype = getattr(torch, run.training.compute_dtype)
        parallelize(self._model, device, compute_dtype, run.training.parallelism)
        self._head = head.to(device)
        optimizer = build_optimizer(self._model, run.training)
        scheduler = build_scheduler(optimizer, run.training, num_steps)
        super().__init__(TrainingState(self._model, optimizer, scheduler), checkpoints)
        depths_K = torch.arange(run.draft.ttt_steps, dtype=torch.float64, device=device)
        self._depth_weight_K = run.training.depth_decay**depths_K
        self._copies = DeviceCopies(device)
        self._free_at = -math.inf
        """When the device was through with the last step that was measured."""

    @property
    def empty_batch(self) -> PackedBatch:
        """What stands for a micro-batch without samples."""
        config = self._config
        return empty_batch(config.aux_width, config.target_hidden_size, self._target_dtype)

    def train_step(self, prepared: PreparedStep) -> Measure:
        """Start one optimizer step, without waiting for a GPU.

        Returns:
            What gives its figures; it raises a UserError if the gradients aren't finite.

        Raises:
            ConfigError: It doesn't fit into the GPU's memory.
        """
        try:
            return self._start_step(prepared)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "training.micro_batch_tokens",
                f"step {prepared.step}, with up to {self._training.micro_batch_tokens} tokens at "
                f"a time, ran out of GPU memory: {error}",
                "Lower it, and data.max_length where that doesn't allow it; the global batch stays",
            ) from error

    def _start_step(self, prepared: PreparedStep) -> Measure:
        started_at = time.monotonic()
        supervisions, last = self._supervise(prepared.batches)
        counts = self._count(prepared, supervisions)
        dist.all_reduce(counts)
        denominator_K = counts[3:]
        # A depth that no chain of the whole batch reaches enters no average.
        scale_K = torch.where(denominator_K > 0, self._depth_weight_K / denominator_K, 0.0)
        # From the last on, which is still on the device.
        others = self._copies.ahead(reversed(prepared.batches[:-1]))
        sums_3K = self._backward(chain([last], others), supervisions[::-1], scale_K)
        dist.all_reduce(sums_3K)
        grad_norm = clip_gradients(self._model, self._training.max_grad_norm)
        learning_rate = self._update()
        loss = (scale_K * sums_3K[0]).sum()
        scalars = torch.stack([loss, grad_norm.double(), *counts[:3]])
        figures = _Figures(torch.cat([scalars, sums_3K[1:].flatten()]))
        return partial(self._measure, prepared, figures, learning_rate, started_at)

    def _supervise(self, batches: Sequence[PackedBatch]) -> tuple[list[Supervision], PackedBatch]:
        """What is supervised of each batch, and the last one on the device."""
        supervisions = []
        for batch in self._copies.ahead(batches):
            supervisions.append(
                supervise(batch, self._head, self._model.ttt_steps, self._training.loss_reduction)
            )
        return supervisions, batch

    def _count(self, prepared: PreparedStep, supervisions: Sequence[Supervision]) -> Tensor:
        """[3 + K], float64: this rank's samples, tokens, loss tokens, and weights by depth."""
        num_loss_tokens = sum(int(batch.loss_mask_T.sum()) for batch in prepared.batches)
        counts = [len(prepared.trained), prepared.num_tokens, num_loss_tokens]
        pinned = self._device.type == "cuda"
        counts_3 = torch.tensor(counts, dtype=torch.float64, pin_memory=pinned)
        weights_K = torch.stack([s.weight_sums_K for s in supervisions]).sum(0)
        return torch.cat([counts_3.to(self._device, non_blocking=True), weights_K])

    def _backward(
        self,
        batches: Iterable[PackedBatch],
        supervisions: Sequence[Supervision],
        scale_K: Tensor,
    ) -> Tensor:
        """Add up the gradients of the global batch; gives this rank's losses, chains, matches.

        Args:
            batches: On the device; brought there one by one, so that all needn't fit.
            supervisions: Theirs.
            scale_K: As ``Eagle3Model`` takes it.
        """
        sums_3K = scale_K.new_zeros(3, len(scale_K))
        for i, (batch, supervised) in enumerate(zip(batches, supervisions, strict=True), 1):
            set_gradient_sync(self._model, i == len(supervisions))
            share, sums = self._model(batch, self._head, supervised, scale_K)
            share.backward()
            sums_3K += torch.stack([sums.loss_K, sums.chains_K, sums.matches_K])
        return sums_3K

    def _update(self) -> float:
        """Apply the gradients; gives the learning rate that was used."""
        optimizer = self._state.optimizer
        learning_rate: float = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        self._state.scheduler.step()
        return learning_rate

    def _measure(
        self, prepared: PreparedStep, figures: "_Figures", learning_rate: float, started_at: float
    ) -> StepMetrics:
        loss, norm, *nums = figures.read()
        # A step is started while the one before runs: what it waited then cost nothing.
        free_at, self._free_at = self._free_at, time.monotonic()
        _check_finite(prepared.step, loss, norm)
        num_samples, num_tokens, num_loss_tokens, *per_depth = map(int, nums)
        num_depths = self._model.ttt_steps
        return StepMetrics(
            step=prepared.step,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=norm,
            chains=tuple(per_depth[:num_depths]),
            matches=tuple(per_depth[num_depths:]),
            num_samples=num_samples,
            num_tokens=num_tokens,
            num_loss_tokens=num_loss_tokens,
            step_s=self._free_at - max(started_at, free_at),
            wait_s=min(prepared.wait_s, max(0.0, started_at - free_at)),
        )

    def start_from(self, path: Path) -> None:
        """Take over a checkpoint's or a draft folder's weights, and nothing else.

        Raises:
            ConfigError: It doesn't fit; the message says which tensor or what else differs.
        """
        assert self.step == 0, "before the first step"
        fresh = FreshDraft(
            self._model, self._config, self._draft_vocab, self._head, self._target, self._run
        )
        continual.load_weights(path, fresh)
        logger.info("event=started_from path=%s", path)

    def export(self, folder: Path) -> None:
        """Write the draft as engines serve it. All ranks take part, rank 0 writes."""
        self.copy_draft()(folder)

    def copy_draft(self) -> SaveDraft:
        """See ``Trainer``. The copy is in host memory, in the dtype of the target."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict: dict[str, Any] = get_model_state_dict(self._model, options=options)
        weights = {
            # On one rank of a CPU they are the very parameters, which the next step changes.
            name.removeprefix(DRAFT_PREFIX): weight.to(self._target_dtype, copy=True)
            for name, weight in state_dict.items()
        }
        return partial(self._save_draft, weights, self.step)

    def _save_draft(self, weights: dict[str, Tensor], step: int, folder: Path) -> None:
        if self._rank == 0:
            save_draft(folder, weights, self._config, self._draft_vocab)
            logger.info("event=exported folder=%s step=%d", folder, step)


class _Figures:
    """A tensor of float64, on its way from a device that nobody waits for before it is read."""

    def __init__(self, figures: Tensor) -> None:
        self._figures = figures.to("cpu", non_blocking=True)
        stream = torch.cuda.current_stream(figures.device) if figures.is_cuda else None
        self._arrived = None if stream is None else stream.record_event()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        figures: list[float] = self._figures.tolist()
        return figures


def _check_finite(step: int, loss: float, grad_norm: float) -> None:
    if not math.isfinite(grad_norm):
        raise UserError(
            f"step {step}: the norm of the gradients is {grad_norm}, the loss {loss}. Lower "
            "training.learning_rate, or set training.compute_dtype to float32"
        )
