"""A tiny target, samples and process groups for the tests of the trainer."""

import copy
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from torchspec_lib.config.models import ModelConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.models.batch import pack
from torchspec_lib.target import TargetSpec, read_target
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.eagle3_trainer import Eagle3Trainer
from torchspec_lib.training.fsdp import Rendezvous, init_process_group
from torchspec_lib.training.prefetch import PreparedStep
from torchspec_lib.training.state import run_identity
from torchspec_lib.types import Accounts, SampleKey, StepMetrics, StepReport

CPU = torch.device("cpu")
HIDDEN, VOCAB, NUM_AUX = 16, 48, 3
DRAFT_VOCAB = np.sort(np.random.default_rng(0).permutation(VOCAB)[:37]).astype(np.int64)
OTHER_VOCAB = np.sort(np.random.default_rng(1).permutation(VOCAB)[:30]).astype(np.int64)
HEAD = "draft.lm_head.weight"
NUM_STEPS = 6
SAMPLE_TOKENS = (9, 5, 14, 3, 22, 7)

ONE_BATCH = [[0, 1, 2, 3, 4, 5]]
Deal = Sequence[Sequence[int]]
"""Indices of the samples in each micro-batch."""


def make_target(folder: Path) -> TargetSpec:
    """Only what a trainer reads of a target: its config, embedding and output head."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(7)
    weights = {
        name: torch.randn(VOCAB, HIDDEN, generator=random)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save_file(weights, folder / "model.safetensors")
    return read_target(ModelConfig(target=str(folder)))


def make_run(target: TargetSpec, draft: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"target": target.path, "dtype": "float32"},
            "data": {"train": ["t.jsonl"], "heldout": ["h.jsonl"], "max_length": 64},
            "draft": {
                "aux_layer_ids": [0, 1, 2],
                "vocab_size": 37,
                "ttt_steps": 3,
                "fc_norm": False,  # EAGLE-3 as published, which others' drafts mostly are
                "norm_output": False,
                **(draft or {}),
            },
            "training": {
                "global_batch_size": 6,
                "optimizer": "adamw",  # Muon rounds to bfloat16 on its way
                "learning_rate": 1e-3,
                "compute_dtype": "float32",
                "max_grad_norm": 1.0,
                "micro_batch_tokens": 64,
                **training,
            },
            "cluster": {"device": "cpu"},
        }
    )


def make_trainer(
    folder: Path,
    run_changes: dict[str, Any] | None = None,
    interval: int = 10**6,
    keep: int = 9,
    checkpoints: Callable[..., CheckpointFolder] = CheckpointFolder,
    draft_vocab: npt.NDArray[np.int64] = DRAFT_VOCAB,
) -> Eagle3Trainer:
    """Its checkpoints go to ``folder / "ckpt"``."""
    target = make_target(folder / f"target-{dist.get_rank()}")
    run = make_run(target, **(run_changes or {}))
    identity = run_identity(run, target, "d0", draft_vocab)
    return Eagle3Trainer(
        run,
        target,
        draft_vocab,
        NUM_STEPS,
        checkpoints(folder / "ckpt", identity, interval, keep),
        CPU,
    )


def make_sample(seed: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """The second half is the assistant's."""
    random = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(VOCAB, (num_tokens,), generator=random, dtype=torch.int32),
        "loss_mask": torch.arange(num_tokens) >= num_tokens // 2,
        "aux_hidden_states": torch.randn(num_tokens, NUM_AUX * HIDDEN, generator=random),
        "last_hidden_states": torch.randn(num_tokens, HIDDEN, generator=random),
    }


def prepare(trainer: Eagle3Trainer, step: int, deal: Deal) -> PreparedStep:
    """A rank's share of a step; other samples in every step."""
    used = [index for batch in deal for index in batch]
    samples = {i: make_sample(100 * step + i, SAMPLE_TOKENS[i]) for i in used}
    return PreparedStep(
        step=step,
        batches=tuple(
            pack([samples[i] for i in batch]) if batch else trainer.empty_batch for batch in deal
        ),
        trained=tuple(SampleKey("run", 0, f"{step}-{i}", 1, "n") for i in used),
        rejected=(),
        num_tokens=sum(SAMPLE_TOKENS[i] for i in used),
    )


@dataclass
class RecordingControl:
    """Takes reports; its accounts are the number of the step."""

    accept_lengths: dict[int, float] = field(default_factory=dict)
    """By step; 1 where it isn't said."""
    reports: list[StepReport] = field(default_factory=list)

    def report(self, report: StepReport) -> None:
        self.reports.append(report)

    def accounts(self, step: int) -> Accounts:
        return Accounts(
            {"cursor": 6 * step, "rejected": {}}, accept_length=self.accept_lengths.get(step, 1.0)
        )


def train(
    trainer: Eagle3Trainer,
    last_step: int,
    deal: Deal,
    accept_lengths: dict[int, float] | None = None,
) -> list[StepMetrics | None]:
    """Go on to ``last_step``; the metrics of each step."""
    control = RecordingControl(accept_lengths or {})
    steps = (prepare(trainer, step, deal) for step in range(trainer.step + 1, last_step + 1))
    assert trainer.run(steps, control) == last_step
    return [report.metrics for report in control.reports]


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def weights_of(trainer: Eagle3Trainer) -> dict[str, torch.Tensor]:
    """A copy, whole on rank 0."""
    return copy.deepcopy(get_model_state_dict(trainer._state.model, options=_WHOLE))


def moments_of(trainer: Eagle3Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """A copy, whole on rank 0. Not before the first step: asking makes the optimizer step."""
    assert trainer.step > 0
    state = trainer._state
    moments = get_optimizer_state_dict(state.model, state.optimizer, options=_WHOLE)
    return copy.deepcopy(moments.get("state", {}))


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    init_process_group(Rendezvous.listen("127.0.0.1"), 0, 1, CPU)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_two_ranks(work: Callable[[Path], None], folder: Path) -> None:
    """Run ``work(folder)`` on both ranks of a fresh process group, in their own processes."""
    with two_ranks_at(work, folder) as processes:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]


@contextmanager
def two_ranks_at(work: Callable[[Path], None], folder: Path) -> Iterator[list[BaseProcess]]:
    """As ``on_two_ranks``, but what becomes of them is the caller's business."""
    # Forked off a process that has imported torch, and done nothing with it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", __name__])
    address = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, address, work, folder)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(rank: int, address: Any, work: Callable[[Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        rendezvous = Rendezvous.listen("127.0.0.1")
        address.put((rendezvous.host, rendezvous.port))
    else:
        rendezvous = Rendezvous.connect(*address.get())
    init_process_group(rendezvous, rank, 2, CPU)
    work(folder)
    dist.destroy_process_group()
