"""A draft's shape: derived from the target, and told to the serving engines."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from tests.unit.eagle3_reference import (
    DRAFT_VOCAB,
    ROPES,
    make_config,
    make_draft,
    make_head,
    make_target,
)
from torchspec_lib.config.models import DraftConfig
from torchspec_lib.errors import ConfigError
from torchspec_lib.models.draft_config import DraftModelConfig


def test_config_json_says_what_both_engines_and_both_transformers_read():
    config = DraftModelConfig.from_target(
        make_target(), DraftConfig(aux_layer_ids=(1, 3, 4)), 11, "bfloat16"
    )
    assert config.to_serving_json() == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": 23,
        "draft_vocab_size": 11,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 128,
        "rope_theta": 500.0,
        "rope_scaling": {k: v for k, v in ROPES["llama3"].items() if k != "rope_theta"},
        "rope_parameters": ROPES["llama3"],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "fc_norm": True,
        "norm_output": True,
        "norm_before_residual": False,
    }
    assert make_config().to_serving_json()["rope_scaling"] is None


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"eos_token_ids": (2, 7), "bos_token_id": None}, {"eos_token_ids": (), "fc_norm": True}],
)
def test_a_config_survives_the_way_through_json_and_transformers_reads_it(tmp_path, rope, changes):
    config = make_config(rope=rope, **changes)
    text = json.dumps(config.to_serving_json())
    assert DraftModelConfig.from_serving_json(json.loads(text)) == config
    (tmp_path / "config.json").write_text(text)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters.items() >= dict(config.rope_parameters).items()
    assert theirs.eagle_aux_hidden_state_layer_ids == [2, 4, 5]


def test_a_draft_takes_its_sizes_from_the_target_unless_told_otherwise():
    target = make_target(num_layers=8)
    config = DraftModelConfig.from_target(target, DraftConfig(intermediate_size=99), 11, "float16")
    assert config.aux_layer_ids == (1, 3, 4)
    assert (config.intermediate_size, config.hidden_size, config.head_dim) == (99, 16, 6)
    assert config.aux_width == 48
    assert config.rope_parameters == target.rope_parameters


@pytest.mark.parametrize("flag", ["fc_norm", "norm_output"])
def test_each_norm_of_eagle_3_1_is_a_setting_of_its_own(flag):
    settings = DraftConfig(**{flag: False})
    config = DraftModelConfig.from_target(make_target(num_layers=8), settings, 11, "float16")
    both = {"fc_norm", "norm_output"}
    assert config.model_dump(include=both) == {name: name != flag for name in both}


@pytest.mark.parametrize(
    ("target", "vocab_size", "key"),
    [
        (make_target(num_layers=4), 11, "draft.aux_layer_ids"),
        (make_target(), 24, "draft.vocab_size"),
        (make_target(rope_parameters={"rope_type": "longrope"}), 11, "model.target"),
        (make_target(rope_parameters=ROPES["default"] | {"partial_rotary_factor": 0.5}), 11, "mod"),
    ],
)
def test_a_target_that_no_draft_can_be_made_for_is_refused(target, vocab_size, key):
    with pytest.raises(ConfigError, match=key):
        DraftModelConfig.from_target(target, DraftConfig(), vocab_size, "bfloat16")


def test_initial_weights_are_reproducible_and_the_head_is_the_targets():
    head, config = make_head(dtype=torch.float32), make_config()
    drafts = [make_draft(config, torch.float32, seed) for seed in (0, 1)]
    for draft in drafts:
        draft.init_weights(head.draft_rows_VdH, torch.Generator().manual_seed(7))
    first, second = (draft.state_dict() for draft in drafts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(first["lm_head.weight"], head.lm_head_VH[torch.from_numpy(DRAFT_VOCAB)])
    assert (first["norm.weight"] == 1).all()
    bound = 1 / np.sqrt(48)
    assert 0.9 * bound < first["fc.weight"].abs().max() <= bound
    other = copy.deepcopy(drafts[0])
    other.init_weights(head.draft_rows_VdH, torch.Generator().manual_seed(8))
    assert not torch.equal(other.fc.weight, drafts[0].fc.weight)
