"""Drafts that stand before the gate, with their reports."""

from torchspec_lib.config.run import RunConfig
from torchspec_lib.registry.candidate import (
    Candidate,
)
from torchspec_lib.results import (
    Cost,
    DatasetManifest,
    EvalReport,
    RegisteredDraft,
    TrainSummary,
)
from torchspec_lib.target import TargetSpec


def make_report(**changes):
    fields = {
        "engine": "hf",
        "draft_steps": 5,
        "temperature": 0.0,
        "prompt_set": "heldout-3f9a0c12 (100 prompts)",
        "max_new_tokens": 128,
        "num_prompts": 100,
        "num_lossless": 100,
        "accept_length": 3.5,
        "accept_rates": (0.9, 0.8, 0.7, 0.6, 0.5),
        "num_new_tokens": 3600,
        "num_target_forwards": 1100,
        "plain_s": 8.0,
        "speculative_s": 10.0,
        "draft_step_s": 0.001,
        "target_step_s": 0.004,
        "prompts": (),
    }
    return EvalReport(**fields | changes)


def make_candidate(tmp_path, **changes):
    target = TargetSpec(
        path="examples/tiny_target",
        fingerprint="feedbeef00000000",
        num_layers=8,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=1024,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(3,),
    )
    manifest = DatasetManifest(
        dataset_id="d4e5",
        num_prompts=1500,
        num_heldout=100,
        num_tokens=120_000,
        num_loss_tokens=60_000,
        longest=300,
        turns={"supervised": 100},
        rejected={"duplicate": 2, "too_long": 1},
        draft_vocab_size=512,
        vocab_coverage=0.99,
    )
    training = TrainSummary(
        run_id="run7",
        draft_dir=str(tmp_path),
        num_steps=300,
        num_prompts=1500,
        num_epochs=1,
        num_trained=1497,
        num_rejected=3,
        rejected={"the target's forward failed": 3},
        num_tokens=120_000,
        loss=0.9,
        accept_length=3.6,
        bytes_streamed=1 << 28,
        resumed_from_step=0,
        wall_s=70.0,
        trainer_wait_s=3.0,
        capture_wait_s=1.0,
    )
    fields = {
        "draft_dir": tmp_path,
        "target": target,
        "manifest": manifest,
        "training": training,
        "report": make_report(),
        "step_metrics": tmp_path / "metrics.jsonl",
        "stage_s": {"prepare": 4.0, "train": 70.4, "evaluate": 20.0},
        "cost": Cost(gpu_hours=0.16, num_gpus=8, num_workers=8, num_tokens=120_000, wall_s=94.4),
    }
    return Candidate(**fields | changes)


def make_outcome(**changes):
    fields = {
        "registered": True,
        "model_name": "eagle3-draft",
        "version": "4",
        "is_champion": True,
        "is_new": True,
        "decision": "accept length 3.500 beats the champion's 3.400 by 0.100",
        "tracking_uri": "sqlite:////data/registry/mlflow.db",
        "summary": "",
    }
    return RegisteredDraft(**fields | changes)


def make_run(target="examples/tiny_target", **sections):
    return RunConfig.model_validate(
        {
            "model": {"target": target},
            "data": {"train": ["t.jsonl"], "heldout": ["h.jsonl"]},
            **sections,
        }
    )
