"""The exported folder: what is in it, that it comes back, and that every fault is found."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training_cases import make_target as make_training_target
from tests.unit.eagle3_reference import (
    DRAFT_VOCAB,
    make_config,
    make_draft,
    make_head,
    make_sample,
    make_target,
)
from torchspec_lib.errors import DraftFormatError
from torchspec_lib.models.eagle3 import KeyValueCache
from torchspec_lib.models.export import load_draft, save_draft
from torchspec_lib.models.validate import _vllm_problems, main, validate_draft


def export(folder, config, pruned=True, seed=0):
    draft = make_draft(config, torch.float32, seed)
    save_draft(folder, draft.state_dict(), config, DRAFT_VOCAB if pruned else None)
    return draft


def test_the_folder_holds_exactly_the_tensors_that_the_engines_read(tmp_path):
    export(tmp_path / "draft", make_config(dtype="bfloat16"))
    tensors = load_file(tmp_path / "draft/model.safetensors")
    vocab = (tensors.pop("d2t"), tensors.pop("t2d"))
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "fc.weight": [16, 48],
        "midlayer.self_attn.q_proj.weight": [24, 32],
        "midlayer.self_attn.k_proj.weight": [12, 32],
        "midlayer.self_attn.v_proj.weight": [12, 32],
        "midlayer.self_attn.o_proj.weight": [16, 24],
        "midlayer.mlp.gate_proj.weight": [20, 16],
        "midlayer.mlp.up_proj.weight": [20, 16],
        "midlayer.mlp.down_proj.weight": [16, 20],
        "midlayer.input_layernorm.weight": [16],
        "midlayer.hidden_norm.weight": [16],
        "midlayer.post_attention_layernorm.weight": [16],
        "norm.weight": [16],
        "lm_head.weight": [11, 16],
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert [tensor.dtype for tensor in vocab] == [torch.int64, torch.bool]
    assert (vocab[0] + torch.arange(11)).tolist() == DRAFT_VOCAB.tolist()
    assert vocab[1].nonzero()[:, 0].tolist() == DRAFT_VOCAB.tolist()
    assert sorted(p.name for p in (tmp_path / "draft").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_an_unpruned_export_has_no_vocabulary_tensors_and_fc_norm_has_its_own(tmp_path):
    config = make_config(pruned=False, fc_norm=True)
    export(tmp_path / "draft", config, pruned=False)
    names = load_file(tmp_path / "draft/model.safetensors").keys()
    assert {"fc_norm.0.weight", "fc_norm.1.weight", "fc_norm.2.weight"} <= names
    assert not {"d2t", "t2d"} & names
    assert load_draft(tmp_path / "draft").draft_vocab is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pruned", [True, False])
def test_a_reloaded_export_gives_the_trainers_logits_bit_for_bit(tmp_path, dtype, pruned):
    config = make_config(pruned, dtype=dtype)
    trained = export(tmp_path / "draft", config, pruned).to(getattr(torch, dtype))
    loaded = load_draft(tmp_path / "draft")
    assert loaded.config == config
    if pruned:
        assert loaded.draft_vocab.tolist() == DRAFT_VOCAB.tolist()
    head, sample = make_head(pruned, getattr(torch, dtype)), make_sample("0" * 9, seed=6)

    def logits(draft):
        states = draft.project(sample["aux_hidden_states"])
        embeds = head.embed(sample["input_ids"].long())
        out = draft.decode(embeds, states, torch.arange(9), KeyValueCache())
        return draft.logits(out)

    assert torch.equal(logits(loaded.draft), logits(trained))
    validate_draft(tmp_path / "draft", make_target())


def test_a_new_export_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    export(tmp_path / "draft", make_config(), seed=0)
    second = export(tmp_path / "draft", make_config(), seed=1)
    loaded = load_draft(tmp_path / "draft").draft
    assert torch.equal(loaded.fc.weight, second.fc.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_an_export_that_does_not_fit_is_refused_and_leaves_the_old_one(tmp_path):
    first = export(tmp_path / "draft", make_config())
    weights = make_draft(make_config(), torch.float32, 1).state_dict()
    with pytest.raises(DraftFormatError, match=r"d2t is missing.*t2d is missing"):
        save_draft(tmp_path / "draft", weights, make_config(), None)
    with pytest.raises(DraftFormatError, match="ascending"):
        save_draft(tmp_path / "draft", weights, make_config(), DRAFT_VOCAB[::-1].copy())
    del weights["norm.weight"]
    with pytest.raises(DraftFormatError, match=r"norm\.weight is missing"):
        save_draft(tmp_path / "draft", weights, make_config(), DRAFT_VOCAB)
    assert torch.equal(load_draft(tmp_path / "draft").draft.fc.weight, first.fc.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]


def ids_instead_of_offsets(tensors):
    tensors["d2t"] += torch.arange(11)


def shifted_head(tensors):
    tensors["t2d"] = tensors["t2d"].roll(1)


def not_finite(tensors):
    tensors["lm_head.weight"][0, 0] = float("nan")


TENSOR_FAULTS = {
    "missing": (lambda t: t.pop("norm.weight"), "tensor norm.weight is missing"),
    "embedding": (
        lambda t: t.update({"embed_tokens.weight": torch.zeros(23, 16)}),
        "unexpected tensor embed_tokens.weight",
    ),
    "prefix": (
        lambda t: t.update({"model.fc.weight": t.pop("fc.weight")}),
        "unexpected tensor model.fc.weight",
    ),
    "dtype": (
        lambda t: t.update({"fc.weight": t["fc.weight"].double()}),
        "tensor fc.weight is torch.float64",
    ),
    "shape": (
        lambda t: t.update({"lm_head.weight": torch.zeros(23, 16)}),
        r"tensor lm_head.weight is torch.float32 \[23, 16\], not torch.float32 \[11, 16\]",
    ),
    "d2t_dtype": (lambda t: t.update({"d2t": t["d2t"].int()}), "tensor d2t is torch.int32"),
    "no_t2d": (lambda t: t.pop("t2d"), "tensor t2d is missing"),
    "d2t_ids": (ids_instead_of_offsets, "offsets, not ids"),
    "t2d": (shifted_head, "t2d marks 11 target ids"),
    "nan": (not_finite, "aren't finite"),
}
CONFIG_FAULTS = {
    "architecture": ({"architectures": ["LlamaForCausalLM"]}, "architectures is"),
    "no_draft_vocab": ({"draft_vocab_size": None}, "draft_vocab_size"),
    "full_vocab": ({"draft_vocab_size": 23}, "unexpected tensor d2t"),
    "short": ({"max_position_embeddings": 64}, "max_position_embeddings is 64, below"),
    "theta": ({"rope_theta": 10000.0}, "rope_theta is 10000.0, not 500.0"),
    "scaling": ({"rope_scaling": None}, "rope_scaling is null"),
    "no_rope": ({"rope_parameters": None}, "rope_parameters"),
    "sglang_ids": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}},
        r"eagle_aux_hidden_state_layer_ids is \[2, 4, 5\], not \[3, 5, 6\]",
    ),
    "vllm_ids": (
        {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
        r"eagle_aux_hidden_state_layer_ids is \[1, 3, 4\], not \[2, 4, 5\]",
    ),
    "no_ids": ({"eagle_config": {}}, "aux_layer_ids"),
    "deep_ids": (
        {
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 8]},
            "eagle_aux_hidden_state_layer_ids": [2, 4, 9],
        },
        "auxiliary layer 8 doesn't exist",
    ),
    "dtype": ({"torch_dtype": "bfloat16"}, "not torch.bfloat16"),
    "vocab": ({"vocab_size": 24}, "vocab_size is 24, the target's is 23"),
    "eos": ({"eos_token_id": 3}, "eos_token_ids"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings is true, not false"),
    "residual": ({"norm_before_residual": True}, "norm_before_residual is true"),
    "fc_norm": ({"fc_norm": True}, "tensor fc_norm.0.weight is missing"),
    "no_flag": ({"norm_output": None}, "norm_output"),
}


@pytest.fixture
def folder(tmp_path):
    export(tmp_path / "draft", make_config(rope="llama3"))
    validate_draft(tmp_path / "draft", make_target())
    return tmp_path / "draft"


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_the_validator_finds_a_faulty_tensor(folder, fault):
    plant, message = TENSOR_FAULTS[fault]
    tensors = load_file(folder / "model.safetensors")
    plant(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DraftFormatError, match=message):
        validate_draft(folder, make_target())


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_the_validator_finds_a_faulty_config(folder, fault):
    changes, message = CONFIG_FAULTS[fault]
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(DraftFormatError, match=message):
        validate_draft(folder, make_target())


def test_the_validator_lists_every_problem_at_once(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"], tensors["t2d"]
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"rope_theta": 1.0, "vocab_size": 24}))
    with pytest.raises(DraftFormatError) as raised:
        validate_draft(folder, make_target())
    assert len(raised.value.problems) == 4


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_or_broken_file_is_named(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(DraftFormatError, match=name):
        load_draft(folder)
    (folder / name).unlink()
    with pytest.raises(DraftFormatError, match=f"{name} is missing"):
        validate_draft(folder, make_target())


def test_a_config_that_is_no_text_is_an_error_that_names_it(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DraftFormatError, match=r"config\.json is no JSON"):
        load_draft(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(DraftFormatError, match=r"config\.json holds no JSON object"):
        load_draft(folder)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5])
@pytest.mark.parametrize("fc_norm", [False, True])
def test_any_number_of_auxiliary_layers_is_told_to_both_engines(tmp_path, num_layers, fc_norm):
    ids = [0, 2, 3, 5, 6][:num_layers]
    config = make_config(aux_layer_ids=ids, fc_norm=fc_norm, rope="llama3")
    export(tmp_path / "draft", config)
    raw = json.loads((tmp_path / "draft/config.json").read_text())
    assert raw["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": ids}
    assert raw["eagle_aux_hidden_state_layer_ids"] == [i + 1 for i in ids]
    loaded = load_draft(tmp_path / "draft")
    assert loaded.config == config
    assert loaded.draft.fc.in_features == num_layers * 16
    validate_draft(tmp_path / "draft", make_target())


def test_vllm_would_find_every_parameter_of_its_class_and_no_other(tmp_path):
    for fc_norm in (False, True):
        config = make_config(fc_norm=fc_norm, norm_output=fc_norm)
        export(tmp_path / "draft", config)
        names = list(load_file(tmp_path / "draft/model.safetensors"))
        assert _vllm_problems(names, config) == []
        assert _vllm_problems([*names, "bias"], config) == ["vLLM: unexpected tensor model.bias"]
        lacking = [name for name in names if name != "fc.weight"]
        assert _vllm_problems(lacking, config) == ["vLLM: tensor model.fc.weight is missing"]


def test_the_command_prints_a_verdict_on_a_folder(folder, tmp_path, capsys):
    assert main([str(folder)]) == 0
    *checks, verdict = capsys.readouterr().out.splitlines()
    assert len(checks) == 6
    assert all(line.endswith(" ok") for line in checks)
    assert verdict.split(maxsplit=1) == ["verdict", "yes, as far as can be told without --target"]

    target = make_training_target(tmp_path / "target")
    assert main([str(folder), "--target", target.path]) == 1
    *checks, verdict = capsys.readouterr().out.splitlines()
    assert "  config.json: vocab_size is 23, the target's is 48" in checks
    assert verdict.split() == ["verdict", "no"]

    assert main([str(folder), "--target", str(tmp_path / "absent")]) == 1
    assert "model.target" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 1
    assert "  config.json is missing" in capsys.readouterr().out.splitlines()
