"""The trainer around the model on a GPU: what it copies, launches and reads, and when."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.training_cases import (
    DRAFT_VOCAB,
    NUM_STEPS,
    ONE_BATCH,
    RecordingControl,
    make_run,
    make_target,
    prepare,
    weights_of,
)
from torchspec_lib.models.batch import pack
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.device_copies import DeviceCopies
from torchspec_lib.training.eagle3_trainer import Eagle3Trainer
from torchspec_lib.training.fsdp import Rendezvous, init_process_group
from torchspec_lib.training.prefetch import PreparedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEAL = [[0, 5], [1, 2], [3, 4]]
OPTIMIZERS = ("adamw", "muon")


@pytest.fixture(scope="module", autouse=True)
def group():
    init_process_group(Rendezvous.listen("127.0.0.1"), 0, 1, GPU)
    yield
    dist.destroy_process_group()


def make_trainer(folder, device, interval=10**6, **training):
    target = make_target(folder / "target")
    run = make_run(target, **training)
    checkpoints = CheckpointFolder(folder / "ckpt", {}, interval, 1)
    return Eagle3Trainer(run, target, DRAFT_VOCAB, NUM_STEPS, checkpoints, device)


def pinned(prepared):
    batches = tuple(batch.pin_memory() for batch in prepared.batches)
    return PreparedStep(
        prepared.step, batches, prepared.trained, prepared.rejected, prepared.num_tokens
    )


@pytest.mark.parametrize("parallelism", ["shard", "replicate"])
def test_a_trainer_on_a_gpu_takes_the_steps_of_one_on_the_cpu(tmp_path, parallelism):
    losses = []
    for device, deal in ((CPU, ONE_BATCH), (GPU, DEAL)):
        trainer = make_trainer(tmp_path, device, parallelism=parallelism)
        control = RecordingControl()
        trainer.run((prepare(trainer, step, deal) for step in (1, 2, 3)), control)
        losses.append([report.metrics.loss for report in control.reports])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_checkpoint_follows_another(tmp_path, optimizer):
    trainer = make_trainer(tmp_path, GPU, interval=1, optimizer=optimizer)
    control = RecordingControl()
    trainer.run((prepare(trainer, step, DEAL) for step in (1, 2, 3)), control)
    again = make_trainer(tmp_path, GPU, optimizer=optimizer)
    again.resume(tmp_path / "ckpt" / "step_000003")
    before, after = weights_of(trainer), weights_of(again)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_of_a_cpu_goes_on_on_a_gpu(tmp_path):
    trainer = make_trainer(tmp_path, CPU, interval=1)
    trainer.run((prepare(trainer, step, ONE_BATCH) for step in (1, 2)), RecordingControl())
    again = make_trainer(tmp_path, GPU)
    again.resume(tmp_path / "ckpt" / "step_000002")
    before, after = weights_of(trainer), weights_of(again)
    assert all(torch.equal(after[name].cpu(), before[name]) for name in before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_starting_a_step_never_waits_for_the_device(tmp_path, optimizer):
    trainer = make_trainer(tmp_path, GPU, optimizer=optimizer)
    trainer.train_step(prepare(trainer, 1, DEAL))()
    steps = [pinned(prepare(trainer, step, DEAL)) for step in (2, 3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        measures = [trainer.train_step(step) for step in steps]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(np.isfinite(measure().loss) for measure in measures)


def test_a_batch_is_copied_while_the_one_before_is_worked_on():
    sample = {
        "input_ids": torch.arange(4096),
        "loss_mask": torch.ones(4096, dtype=torch.bool),
        "aux_hidden_states": torch.randn(4096, 3072),
        "last_hidden_states": torch.randn(4096, 1024),
    }
    batches = [pack([sample], pin_memory=True) for _ in range(3)]
    assert all(batch.aux_states_TA.is_pinned() for batch in batches)
    busy = torch.randn(8192, 8192, device=GPU)
    copies = DeviceCopies(GPU)
    for batch in copies.ahead(batches):
        for _ in range(20):
            busy @ busy
        worked = torch.cuda.Event()
        worked.record()
        copies._stream.synchronize()
        assert not worked.query()  # the next one has arrived, and this one's work goes on
        assert torch.equal(batch.aux_states_TA.cpu(), sample["aux_hidden_states"])
