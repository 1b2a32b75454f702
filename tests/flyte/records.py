"""Records that several tests start from."""

from torchspec_lib.results import DatasetManifest, Estimate, TrainSummary

MANIFEST = DatasetManifest(
    dataset_id="d4e5",
    num_prompts=1500,
    num_heldout=100,
    num_tokens=120_000,
    num_loss_tokens=60_000,
    longest=300,
    turns={"supervised": 100},
    rejected={},
    draft_vocab_size=512,
    vocab_coverage=0.99,
)
ESTIMATE = Estimate(train_s=9000.0, gpu_hours=20.0, basis="run c0ffee took 5 tokens a second")
SUMMARY = TrainSummary(
    run_id="c0ffee",
    draft_dir="draft",
    num_steps=60,
    num_prompts=300,
    num_epochs=1,
    num_trained=299,
    num_rejected=1,
    rejected={"too long": 1},
    num_tokens=24_000,
    loss=1.25,
    accept_length=2.5,
    bytes_streamed=50 << 20,
    resumed_from_step=0,
    wall_s=12.0,
    trainer_wait_s=1.5,
    capture_wait_s=0.5,
)
