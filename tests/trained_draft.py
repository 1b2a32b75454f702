"""A good draft for a tiny target, trained in this process: without engines, store and Ray."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.dataset import load_draft_vocab, load_prompts
from torchspec_lib.models.batch import pack
from torchspec_lib.models.target_model import captured_outputs, decoder_parts, load_target
from torchspec_lib.target import TargetSpec, aux_layer_ids
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.eagle3_trainer import Eagle3Trainer
from torchspec_lib.training.fsdp import Rendezvous, init_process_group
from torchspec_lib.training.prefetch import PreparedStep
from torchspec_lib.types import Prompt


def train_draft(run: RunConfig, target: TargetSpec, dataset: Path, folder: Path) -> None:
    """Train on a prepared data set as ``run`` says, in one epoch; export to ``folder``."""
    device = torch.device(run.cluster.device, 0)  # NCCL wants the index too
    samples = capture(run, target, load_prompts(dataset), device)
    size = run.training.global_batch_size
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    init_process_group(Rendezvous.listen("127.0.0.1"), 0, 1, device)
    try:
        checkpoints = CheckpointFolder(folder.with_suffix(".checkpoints"), {}, 10**6, 1)
        vocab = load_draft_vocab(dataset)
        trainer = Eagle3Trainer(run, target, vocab, len(batches), checkpoints, device)
        for step, batch in enumerate(batches, start=1):
            trainer.train_step(PreparedStep(step, (pack(batch),), (), (), num_tokens=1))()
        trainer.export(folder)
    finally:
        dist.destroy_process_group()


@torch.inference_mode()
def capture(
    run: RunConfig, target: TargetSpec, prompts: list[Prompt], device: torch.device
) -> list[dict[str, Tensor]]:
    """What an engine captures, by a hook on each layer."""
    model = load_target(target, run.model.dtype, device, trust_remote_code=False)
    decoder, layers, norm = decoder_parts(model)
    chosen = [layers[i] for i in aux_layer_ids(run.draft, target)]
    samples = []
    with captured_outputs([*chosen, norm]) as states:
        for prompt in prompts:
            decoder(torch.from_numpy(prompt.token_ids.astype(np.int64))[None].to(device))
            samples.append(
                {
                    "input_ids": torch.from_numpy(prompt.token_ids.astype(np.int32)),
                    "loss_mask": torch.from_numpy(prompt.loss_mask.astype(bool)),
                    "aux_hidden_states": torch.cat(states[:-1], dim=-1).cpu().clone(),
                    "last_hidden_states": states[-1].cpu().clone(),
                }
            )
    return samples
