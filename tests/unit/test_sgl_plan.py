"""Engines of several GPUs and nodes: which there are, and where they go."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from torchspec_lib.config.inference import InferenceConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.errors import ConfigError
from torchspec_lib.inference.engine.sgl_arguments import WHOLE, Part, engine_arguments
from torchspec_lib.inference.engine.sgl_memory import colocated_fraction, trainer_bytes
from torchspec_lib.plan import bundles_of, make_plan
from torchspec_lib.plan_preview import describe, main, preview
from torchspec_lib.target import TargetSpec, read_target

QWEN, KIMI = (
    PROJECT_ROOT / "examples" / name / "config.yaml"
    for name in ("qwen3-8b-single-node", "kimi-k25-3node-h100")
)
TINY = PROJECT_ROOT / "configs/tiny_sglang.yaml"


def load(path: Path, **changes: dict[str, Any]) -> RunConfig:
    settings = yaml.safe_load(path.read_text())["run"]
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    return RunConfig.model_validate(settings)


def engines(**settings: Any) -> InferenceConfig:
    return InferenceConfig.model_validate({"engine": "sglang"} | settings)


@pytest.mark.parametrize(
    ("settings", "num_engines", "size"),
    [
        ({"inference_num_gpus": 4}, 4, 1),
        ({"inference_num_gpus": 4, "sglang": {"tp_size": 2}}, 2, 2),
        ({"inference_num_gpus": 16, "sglang": {"nnodes": 2}}, 1, 16),
        ({"inference_num_gpus": 32, "sglang": {"nnodes": 2}}, 2, 16),
        ({"inference_num_gpus": 8, "sglang": {"nnodes": 2, "tp_size": 4}}, 2, 4),
    ],
)
def test_engines_follow_from_their_gpus(settings, num_engines, size):
    config = engines(**settings)
    assert (config.num_engines, config.num_gpus_per_engine) == (num_engines, size)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inference_num_gpus": 3, "sglang": {"tp_size": 2}}, "multiple"),
        ({"inference_num_gpus": 3, "sglang": {"tp_size": 3, "nnodes": 2}}, "evenly"),
        ({"inference_num_gpus": 16, "sglang": {"tp_size": 16}}, "evenly"),
        ({"sglang": {"extra_args": {"disable_radix_cache": False}}}, "disable_radix_cache"),
        (
            {"inference_num_gpus": 4, "sglang": {"tp_size": 2, "dist_init_addr": "10.0.0.1:9"}},
            "dist_init_addr",
        ),
        ({"sglang": {"dist_init_addr": "10.0.0.1"}}, "dist_init_addr"),
    ],
)
def test_engines_that_do_not_add_up_are_refused_by_name(settings, words):
    with pytest.raises(ValidationError, match=words):
        engines(**settings)


def test_an_engine_over_two_nodes_has_a_bundle_on_each():
    training, inference = bundles_of(load(KIMI))
    assert [bundle.num_gpus for bundle in training] == [1] * 4
    assert [bundle.num_gpus for bundle in inference] == [8, 8]


def test_engines_of_several_gpus_share_none_with_trainers():
    run = load(QWEN, cluster={"placement": "colocate"}, inference={"sglang": {"tp_size": 2}})
    with pytest.raises(ConfigError, match="colocate"):
        bundles_of(run)


def test_the_last_layer_is_refused_before_anything_starts():
    run = load(TINY)
    target = read_target(run.model)
    run = load(TINY, draft={"aux_layer_ids": [1, target.num_layers - 1]})
    with pytest.raises(ConfigError, match="last layer"):
        make_plan(run, target, num_prompts=10, longest=100)


def test_what_the_user_adds_reaches_sglang_and_what_capture_needs_stays():
    added = {"attention_backend": "triton", "mem_fraction_static": 0.5}
    run = load(TINY, inference={"sglang": {"extra_args": added}})
    target = read_target(run.model)
    arguments = engine_arguments(run, target, WHOLE)
    assert arguments | added == arguments
    assert arguments["disable_radix_cache"]
    assert arguments["disable_cuda_graph"]
    part = engine_arguments(run, target, Part(1, "10.0.0.1:29000"))
    assert (part["node_rank"], part["dist_init_addr"]) == (1, "10.0.0.1:29000")


def test_the_examples_show_their_placement_without_a_gpu(capsys):
    assert main([str(KIMI)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "node 0: 8 GPUs, 4 free",
        "  GPU 0       trainer rank 0",
        "  GPU 1       trainer rank 1",
        "  GPU 2       trainer rank 2",
        "  GPU 3       trainer rank 3",
        "node 1: 8 GPUs, 0 free",
        "  GPUs 0-7    engine 0, part 1 of 2, answers",
        "node 2: 8 GPUs, 0 free",
        "  GPUs 0-7    engine 0, part 2 of 2, computes",
    ]
    assert main([str(QWEN)]) == 0
    assert "engine 1" in capsys.readouterr().out


@pytest.mark.parametrize("folder", [QWEN.parent, KIMI.parent], ids=lambda path: path.name)
def test_the_examples_scripts_are_valid_and_show_their_plan(folder):
    for script in folder.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    shown = subprocess.run(
        [str(folder / "run.sh"), "--plan"], env=environment, check=True, capture_output=True
    )
    assert b"trainer rank 0" in shown.stdout


def test_colocated_engines_are_shown_beside_their_trainers():
    run = load(QWEN, cluster={"placement": "colocate"})
    assert "trainer rank 1 with engine 1" in describe(run, preview(run))


def test_an_engine_that_no_node_holds_is_refused():
    run = load(QWEN, inference={"inference_num_gpus": 4, "sglang": {"tp_size": 4}})
    with pytest.raises(ConfigError, match="needs 4 on one node"):
        preview(run, units_per_node=2)


QWEN3_8B = TargetSpec(
    path="",
    fingerprint="",
    num_layers=36,
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    rope_parameters={},
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_ids=(),
)
H200_BYTES, FREE_BYTES = 139 << 30, 100 << 30


@pytest.fixture
def qwen3_8b(tmp_path):
    """Its sizes, with weight files that take no room on the disk."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(16_400_000_000)
    return QWEN3_8B.model_copy(update={"path": str(tmp_path)})


def test_a_colocated_engine_gets_what_its_weights_and_cache_need(qwen3_8b):
    run = load(QWEN, training={"micro_batch_tokens": 8192})
    fraction = colocated_fraction(run, qwen3_8b, 65536, H200_BYTES, FREE_BYTES)
    cache = 65536 * 36 * 8 * 128 * 2 * 2
    assert fraction * FREE_BYTES == pytest.approx((1 << 29) + 1.1 * (16_400_000_000 + cache))


def test_colocation_that_does_not_fit_is_refused_with_the_amounts(qwen3_8b):
    run = load(QWEN, training={"micro_batch_tokens": 65536})
    with pytest.raises(ConfigError, match=r"GiB of a GPU with 139.* for the trainer"):
        colocated_fraction(run, qwen3_8b, 65536, H200_BYTES, FREE_BYTES)


def test_colocation_leaves_room_for_the_decoder_of_snapshots(qwen3_8b):
    changes = {"training": {"micro_batch_tokens": 8192}}
    gpu_bytes = 72 << 30
    colocated_fraction(load(QWEN, **changes), qwen3_8b, 4096, gpu_bytes, FREE_BYTES)
    with_snapshots = load(QWEN, **changes, snapshots={"interval_steps": 100, "num_prompts": 8})
    with pytest.raises(ConfigError, match=r"17 for the decoder of snapshots.*interval_steps"):
        colocated_fraction(with_snapshots, qwen3_8b, 4096, gpu_bytes, FREE_BYTES)


def test_a_trainers_estimate_covers_what_a_plain_trainer_took_on_an_h200(qwen3_8b):
    """62.0 GB at 16,384 tokens, and 16.8 GB at 4,096, without checkpointing."""
    for num_tokens, measured in [(16384, 62.0e9), (4096, 16.8e9)]:
        training = {"micro_batch_tokens": num_tokens, "training_num_gpus_per_node": 1}
        estimate = trainer_bytes(load(QWEN, training=training), qwen3_8b)
        assert measured < estimate < 1.5 * measured
