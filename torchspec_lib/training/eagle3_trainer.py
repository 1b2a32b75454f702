"""EAGLE-3 (arXiv 2503.01840) under FSDP2.

Shapes: ``K`` depths of the training-time test, ``Vd`` draft vocabulary.
"""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import UserError
from torchspec_lib.models.batch import PackedBatch, empty_batch
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.eagle3 import Eagle3Draft
from torchspec_lib.models.export import save_draft
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.models.ttt import Eagle3Model, Supervision, supervise
from torchspec_lib.target import TargetSpec
from torchspec_lib.training import continual
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.continual import DRAFT_PREFIX
from torchspec_lib.training.fsdp import clip_gradients, set_gradient_sync, shard
from torchspec_lib.training.optimizer import build_optimizer, build_scheduler
from torchspec_lib.training.prefetch import PreparedStep
from torchspec_lib.training.state import TrainingState
from torchspec_lib.training.trainer import Trainer
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
        self._training, self._device = run.training, device
        self._target_dtype = getattr(torch, run.model.dtype)
        self._draft_vocab = draft_vocab
        head = TargetHead.load(target, draft_vocab, self._target_dtype)
        self._config = DraftModelConfig.from_target(
            target, run.draft, len(head.draft_rows_VdH), run.model.dtype
        )
        draft = Eagle3Draft(self._config)
        draft.init_weights(head.draft_rows_VdH, torch.Generator().manual_seed(run.seed))
        self._model = Eagle3Model(draft, run.draft.ttt_steps, run.training.loss)
        shard(self._model, device, getattr(torch, run.training.compute_dtype))
        self._head = head.to(device)
        optimizer = build_optimizer(self._model, run.training)
        scheduler = build_scheduler(optimizer, run.training, num_steps)
        super().__init__(TrainingState(self._model, optimizer, scheduler), checkpoints)
        depths_K = torch.arange(run.draft.ttt_steps, dtype=torch.float64, device=device)
        self._depth_weight_K = run.training.depth_decay**depths_K

    @property
    def empty_batch(self) -> PackedBatch:
        """What stands for a micro-batch without samples."""
        config = self._config
        return empty_batch(config.aux_width, config.target_hidden_size, self._target_dtype)

    def train_step(self, prepared: PreparedStep) -> StepMetrics:
        """Take one optimizer step; its figures are read from the device once, at the end.

        Raises:
            UserError: The gradients aren't finite.
        """
        start = time.monotonic()
        supervisions = [self._supervise(batch) for batch in prepared.batches]
        counts = self._count(prepared, supervisions)
        dist.all_reduce(counts)
        denominator_K = counts[3:]
        # A depth that no chain of the whole batch reaches enters no average.
        scale_K = torch.where(denominator_K > 0, self._depth_weight_K / denominator_K, 0.0)
        sums_3K = self._backward(prepared.batches, supervisions, scale_K)
        dist.all_reduce(sums_3K)
        grad_norm = clip_gradients(self._model, self._training.max_grad_norm)
        learning_rate = self._update()
        loss = (scale_K * sums_3K[0]).sum()
        scalars = torch.stack([loss, grad_norm.double(), *counts[:3]])
        loss_, norm, *nums = torch.cat([scalars, sums_3K[1:].flatten()]).tolist()
        _check_finite(prepared.step, loss_, norm)
        num_samples, num_tokens, num_loss_tokens, *per_depth = map(int, nums)
        num_depths = len(scale_K)
        return StepMetrics(
            step=prepared.step,
            loss=loss_,
            learning_rate=learning_rate,
            grad_norm=norm,
            chains=tuple(per_depth[:num_depths]),
            matches=tuple(per_depth[num_depths:]),
            num_samples=num_samples,
            num_tokens=num_tokens,
            num_loss_tokens=num_loss_tokens,
            step_s=time.monotonic() - start,
            wait_s=prepared.wait_s,
        )

    def _supervise(self, batch: PackedBatch) -> Supervision:
        return supervise(
            batch.to(self._device),
            self._head,
            self._model.ttt_steps,
            self._training.loss_reduction,
        )

    def _count(self, prepared: PreparedStep, supervisions: Sequence[Supervision]) -> Tensor:
        """[3 + K], float64: this rank's samples, tokens, loss tokens, and weights by depth."""
        num_loss_tokens = sum(int(batch.loss_mask_T.sum()) for batch in prepared.batches)
        counts = [len(prepared.trained), prepared.num_tokens, num_loss_tokens]
        weights_K = torch.stack([s.weight_sums_K for s in supervisions]).sum(0)
        return torch.cat([torch.tensor(counts).to(weights_K, non_blocking=True), weights_K])

    def _backward(
        self,
        batches: Sequence[PackedBatch],
        supervisions: Sequence[Supervision],
        scale_K: Tensor,
    ) -> Tensor:
        """Add up the gradients of the global batch; gives this rank's losses, chains, matches.

        A batch is copied to the device a second time: so only one has to fit there.
        """
        sums_3K = scale_K.new_zeros(3, len(scale_K))
        for i, (batch, supervised) in enumerate(zip(batches, supervisions, strict=True)):
            set_gradient_sync(self._model, i == len(batches) - 1)
            share, sums = self._model(batch.to(self._device), self._head, supervised, scale_K)
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

    def start_from(self, path: Path) -> None:
        """Take over a checkpoint's or an exported draft's weights, and nothing else.

        Raises:
            ConfigError: It doesn't fit; the message says which tensor or what else differs.
        """
        assert self.step == 0, "before the first step"
        continual.load_weights(path, self._model, self._config, self._draft_vocab)
        logger.info("event=started_from path=%s", path)

    def export(self, folder: Path) -> None:
        """Write the draft as engines serve it. All ranks take part, rank 0 writes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict: dict[str, Any] = get_model_state_dict(self._model, options=options)
        if dist.get_rank() == 0:
            weights = {name.removeprefix(DRAFT_PREFIX): w for name, w in state_dict.items()}
            save_draft(folder, weights, self._config, self._draft_vocab)
            logger.info("event=exported folder=%s step=%d", folder, self.step)


def _check_finite(step: int, loss: float, grad_norm: float) -> None:
    if not math.isfinite(grad_norm):
        raise UserError(
            f"step {step}: the norm of the gradients is {grad_norm}, the loss {loss}. Lower "
            "training.learning_rate, or set training.compute_dtype to float32"
        )
