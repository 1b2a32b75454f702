import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from torchspec_lib.config.models import ModelConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import find_path
from torchspec_lib.errors import ConfigError
from torchspec_lib.plan import SEGMENT_SLACK, make_plan
from torchspec_lib.target import TargetSpec, aux_layer_ids, read_target


def run_config(**changes) -> RunConfig:
    values = {"model": {"target": "t"}, "data": {"train": ["a.jsonl"], "heldout": ["b.jsonl"]}}
    return RunConfig.model_validate(values | changes)


def target(**changes) -> TargetSpec:
    values = {
        "path": "t",
        "fingerprint": "0" * 16,
        "num_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_ids": (151645,),
    }
    return TargetSpec.model_validate(values | changes)


def test_configuration_plan_and_control_plane_load_neither_torch_nor_ray():
    modules = "config, plan, target, results, types, errors"
    code = (
        f"from torchspec_lib import {modules}\n"
        "from torchspec_lib.controller import training_controller, inference_manager\n"
        "import sys; print([m for m in ('torch', 'ray', 'flytekit') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_misspelt_key_is_named():
    with pytest.raises(ValidationError, match=r"training\.learning_rat\n"):
        run_config(training={"learning_rat": 1e-3})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "learning_rate", -1e-3),
        ("training", "learning_rate", 0),
        ("training", "max_grad_norm", -1),
        ("training", "warmup_ratio", 1.5),
        ("training", "global_batch_size", 0),
        ("inference", "max_failed_fraction", 2),
        ("registry", "min_accept_length", 0.5),
        ("transfer", "protocol", "udp"),
        ("data", "last_turn_only", "sometimes"),
        ("data", "chat_template_kwargs", {"messages": "hi"}),
        ("data", "chat_template_kwargs", {"enable_thinking": None}),
    ],
)
def test_an_impossible_value_is_refused_where_it_stands(section, key, value):
    with pytest.raises(ValidationError, match=rf"{section}\.{key}"):
        run_config(**{section: {key: value}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"training_num_gpus_per_node": 32}}, "at least the number of trainer ranks"),
        ({"training": {"micro_batch_tokens": 100}}, "must hold the longest sample"),
        ({"transfer": {"protocol": "rdma"}}, "device_name"),
        ({"transfer": {"device_name": "mlx5_0"}}, "device_name"),
        ({"draft": {"aux_layer_ids": [3, 1]}}, "ascending"),
        ({"evaluation": {"draft_topk": 4}}, "set num_draft_tokens"),
        ({"evaluation": {"draft_steps": 3, "num_draft_tokens": 5}}, "must be draft_steps . 1"),
        (
            {"evaluation": {"draft_steps": 2, "draft_topk": 2, "num_draft_tokens": 8}},
            "must be from 2 to 7",
        ),
        ({"evaluation": {"sets": {"heldout": "a.jsonl"}}}, "rename it"),
        ({"evaluation": {"engine": "sglang", "temperature": 0.7}}, "must be 0 with engine"),
        (
            {"evaluation": {"engine": "sglang"}, "inference": {"sglang": {"nnodes": 2}}},
            "runs on one node",
        ),
        (
            {
                "cluster": {"placement": "colocate"},
                "inference": {"inference_num_gpus": 2},
            },
            "equal",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        run_config(**changes)


def by_sglang(**extra_args) -> RunConfig:
    return run_config(inference={"engine": "sglang", "sglang": {"extra_args": extra_args}})


def test_a_run_id_ignores_what_does_not_change_the_training():
    base = run_config()
    same = [
        run_config(fresh=True, evaluation={"draft_steps": 3}, data_root="elsewhere"),
        run_config(recovery={"on_damaged_checkpoint": "use_older"}),
        run_config(training={"training_num_gpus_per_node": 4, "checkpoint_interval": 7}),
        run_config(inference={"inference_num_gpus": 3}, transfer={"mode": "embedded"}),
    ]
    others = [run_config(seed=1), run_config(training={"learning_rate": 1e-3})]
    others += [by_sglang(), by_sglang(quantization="fp8")]
    assert by_sglang(mem_fraction_static=0.5).training_hash("d") == others[2].training_hash("d")
    assert {run.training_hash("d") for run in same} == {base.training_hash("d")}
    ids = {run.training_hash("d") for run in [base, *others]} | {base.training_hash("e")}
    assert len(ids) == 6


def test_an_input_is_found_from_the_working_directory_and_from_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    assert find_path("mine.jsonl", "k") == tmp_path / "mine.jsonl"
    assert find_path("pyproject.toml", "k").is_file()
    with pytest.raises(ConfigError, match=r"data\.train\[0\].*nowhere\.jsonl"):
        find_path("nowhere.jsonl", "data.train[0]")


def test_the_default_auxiliary_layers_are_those_of_the_paper():
    assert aux_layer_ids(run_config().draft, target()) == (1, 15, 28)


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5])
def test_a_target_too_shallow_for_the_default_needs_explicit_layers(num_layers):
    with pytest.raises(ConfigError, match=r"draft\.aux_layer_ids.*too few"):
        aux_layer_ids(run_config().draft, target(num_layers=num_layers))


def test_a_layer_that_the_target_lacks_is_refused():
    draft = run_config(draft={"aux_layer_ids": [1, 32]}).draft
    with pytest.raises(ConfigError, match="layer 32 doesn't exist"):
        aux_layer_ids(draft, target())


def test_the_store_holds_what_may_be_in_flight_and_that_holds_a_global_batch():
    run = run_config(training={"global_batch_size": 16})
    plan = make_plan(run, target(), num_prompts=100, longest=4096)
    assert plan.bytes_per_token == 4 * 4096 * 2 + 5
    assert plan.max_in_flight_bytes >= 16 * plan.sample_bytes
    assert plan.segment_bytes >= SEGMENT_SLACK * plan.max_in_flight_bytes
    assert plan.num_steps == 7


@pytest.mark.parametrize("key", ["max_in_flight_bytes", "segment_bytes"])
def test_a_byte_budget_below_one_global_batch_is_refused(key):
    run = run_config(transfer={key: 1 << 20})
    with pytest.raises(ConfigError, match=rf"transfer\.{key}.*global batch"):
        make_plan(run, target(), num_prompts=100, longest=4096)


def test_colocation_shares_bundles_and_debug_modes_leave_one_side_out():
    def bundles(placement: str):
        plan = make_plan(run_config(cluster={"placement": placement}), target(), 10, 64)
        return len(plan.training_bundles), len(plan.inference_bundles), plan.num_gpus

    assert bundles("separate") == (1, 1, 2)
    assert bundles("colocate") == (1, 0, 1)
    assert bundles("debug_train_only") == (1, 0, 1)
    assert bundles("debug_inference_only") == (0, 1, 1)


def test_a_targets_fingerprint_tells_other_weights_of_the_same_size(tmp_path):
    def fingerprint(weights: bytes) -> str:
        config = target().model_dump(exclude={"path", "fingerprint", "rope_parameters"})
        config |= {"num_hidden_layers": 32, "rope_theta": 1e6}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes(weights)
        return read_target(ModelConfig(target=str(tmp_path))).fingerprint

    weights = bytes(3_000_000)
    assert fingerprint(weights) == fingerprint(weights)
    assert fingerprint(weights) != fingerprint(weights[:-1] + b"x")
    assert fingerprint(weights) != fingerprint(b"x" + weights[1:])
