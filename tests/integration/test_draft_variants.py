"""Drafts that start from other layouts and vocabularies, or with other layers."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training_cases import (
    CPU,
    DRAFT_VOCAB,
    HEAD,
    HIDDEN,
    ONE_BATCH,
    OTHER_VOCAB,
    SAMPLE_TOKENS,
    VOCAB,
    make_run,
    make_sample,
    make_target,
    make_trainer,
    one_rank,
    train,
    weights_of,
)
from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.vocab import inherited_vocab
from torchspec_lib.errors import ConfigError
from torchspec_lib.models.batch import pack
from torchspec_lib.models.export import load_draft
from torchspec_lib.models.published import read_published
from torchspec_lib.models.validate import validate_draft
from torchspec_lib.pipeline import preflight
from torchspec_lib.run_folder import continual_fingerprint
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.eagle3_trainer import Eagle3Trainer
from torchspec_lib.training.prefetch import PreparedStep

REMAP = {"continual_from": "anywhere", "continual_vocab": "remap"}


@pytest.fixture(scope="module", autouse=True)
def group():
    with one_rank():
        yield


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An exported draft after two steps."""
    folder = tmp_path_factory.mktemp("own")
    trainer = make_trainer(folder)
    train(trainer, 2, ONE_BATCH)
    trainer.export(folder / "draft")
    return folder / "draft"


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path / "target")


def write(folder, raw, tensors, as_torch=False):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    if as_torch:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def published(own, folder, layout, **changes):
    """``own`` as somebody else would have published it."""
    raw = json.loads((own / "config.json").read_text())
    tensors = load_file(own / "model.safetensors")
    if layout == "safeailab":  # an old config, pickled weights, the default layers unsaid
        for key in ("eagle_config", "eagle_aux_hidden_state_layer_ids", "rope_parameters"):
            del raw[key]
        for key in ("head_dim", "fc_norm", "norm_output", "norm_before_residual", "rope_scaling"):
            del raw[key]
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        tensors["d2t"] = tensors["d2t"].int()
    elif layout == "vllm":  # its own names and convention, its own embedding
        del raw["eagle_config"]
        tensors = {
            name if name in ("d2t", "t2d", "lm_head.weight") else f"model.{name}": tensor
            for name, tensor in tensors.items()
        }
        tensors = {k.replace("midlayer.", "layers.0."): v for k, v in tensors.items()}
        tensors["model.embed_tokens.weight"] = torch.zeros(VOCAB, HIDDEN)
    elif layout == "sglang":  # no mask of the vocabulary
        del raw["eagle_aux_hidden_state_layer_ids"], tensors["t2d"]
    return write(folder, raw | changes, tensors, as_torch=layout == "safeailab")


@pytest.mark.parametrize("layout", ["safeailab", "vllm", "sglang"])
def test_a_draft_in_anybodys_layout_gives_its_weights(own, tmp_path, caplog, layout):
    folder = published(own, tmp_path / layout, layout)
    assert len(continual_fingerprint(folder)) == 16
    expected = load_draft(own).draft.state_dict()
    trainer = make_trainer(tmp_path / "run")
    if layout == "safeailab":
        # A target of 8 layers would have default ones; this one has too few.
        with pytest.raises(ConfigError, match="names no eagle_aux_hidden_state_layer_ids"):
            trainer.start_from(folder)
        ids = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 0, 1]}}
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | ids))
    with caplog.at_level(logging.WARNING):
        trainer.start_from(folder)
    weights = weights_of(trainer)
    assert {name.removeprefix("draft.") for name in weights} == set(expected)
    for name, tensor in expected.items():
        close = 1e-3 if layout == "safeailab" else 0.0
        torch.testing.assert_close(weights[f"draft.{name}"], tensor, rtol=close, atol=close)
    assert ("embedding_left_out" in caplog.text) == (layout == "vllm")
    [step, *_] = train(trainer, 1, ONE_BATCH)
    assert step.step == 1


def test_the_layers_of_a_draft_that_names_none_are_the_targets_default(own, tmp_path, target):
    folder = published(own, tmp_path / "theirs", "safeailab")
    deeper = target.model_copy(update={"num_layers": 8})
    assert read_published(folder, deeper).config.aux_layer_ids == (1, 3, 4)


def starting_from(folder, target, vocab_size=37, continual_vocab="keep") -> RunConfig:
    draft = {"vocab_size": vocab_size, "aux_layer_ids": [0, 1, 2]}
    training = {"continual_from": str(folder), "continual_vocab": continual_vocab}
    return RunConfig.model_validate(
        {
            "model": {"target": target.path},
            "data": {"train": ["some/prompts"], "heldout": ["others"], "max_length": 64},
            "evaluation": {"max_new_tokens": 32},
            "cluster": {"device": "cpu"},
            "draft": {**draft, "fc_norm": False, "norm_output": False},
            "training": training,
        }
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_before_residual": True}, "norm_before_residual is True, and only False"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, and only 1"),
        ({"speculators_model_type": "eagle3"}, "speculators' format"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, "they must differ by one"),
        ({"num_key_value_heads": 2}, r"k_proj\.weight is \[8, 32\], its config says \[16, 32\]"),
        ({"fc_norm": True}, r"tensor fc_norm\.0\.weight is missing"),
        ({"draft_vocab_size": 36}, "tensor d2t has 37 tokens, its config says 36"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu' there and 'silu' here"),
    ],
)
def test_what_another_network_has_is_named(own, tmp_path, changes, words):
    folder = published(own, tmp_path / "theirs", "ours", **changes)
    with pytest.raises(ConfigError, match=rf"training\.continual_from: .*{words}"):
        make_trainer(tmp_path / "run").start_from(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_output": True}, "norm_output is True there and False here"),
        ({"norm_before_residual": True}, "norm_before_residual is True, and only False"),
    ],
)
def test_another_network_is_refused_before_anything_starts(own, tmp_path, target, changes, words):
    run = starting_from(published(own, tmp_path / "theirs", "ours", **changes), target)
    with pytest.raises(ConfigError, match=rf"training\.continual_from: .*{words}"):
        preflight(run)


def test_damaged_weights_are_refused_before_anything_starts(own, tmp_path, target):
    folder = published(own, tmp_path / "theirs", "ours")
    assert preflight(starting_from(folder, target)) == target
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"training\.continual_from: .*model\.safetensors: "):
        preflight(starting_from(folder, target))


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x02}q\x00."])
def test_weights_that_are_no_weights_are_refused(own, tmp_path, content):
    folder = published(own, tmp_path / "theirs", "safeailab")
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin|is missing"):
        make_trainer(tmp_path / "run").start_from(folder)


def test_a_draft_that_was_trained_with_another_rope_is_started_from_with_a_warning(
    own, tmp_path, caplog
):
    other = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    folder = published(own, tmp_path / "theirs", "ours", **other)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path / "run").start_from(folder)
    assert "event=starts_with_other_settings" in caplog.text
    assert "rope_parameters" in caplog.text


def test_a_remapped_head_has_the_shared_tokens_rows_and_else_the_targets(own, tmp_path):
    trainer = make_trainer(
        tmp_path, {**REMAP, "draft": {"vocab_size": 30}}, draft_vocab=OTHER_VOCAB
    )
    fresh = weights_of(trainer)[HEAD]
    trainer.start_from(own)
    weights, theirs = weights_of(trainer), load_draft(own).draft.state_dict()
    lm_head = load_file(tmp_path / "target-0/model.safetensors")["lm_head.weight"]
    shared = 0
    for row, token in enumerate(OTHER_VOCAB.tolist()):
        if token in DRAFT_VOCAB:
            shared += 1
            old = theirs["lm_head.weight"][DRAFT_VOCAB.tolist().index(token)]
            assert torch.equal(weights[HEAD][row], old)
            assert not torch.equal(weights[HEAD][row], fresh[row])
        else:
            assert torch.equal(weights[HEAD][row], lm_head[token])
    assert 0 < shared < len(OTHER_VOCAB)
    assert torch.equal(weights["draft.fc.weight"], theirs["fc.weight"])
    assert train(trainer, 1, ONE_BATCH)


def test_a_vocabulary_is_kept_unless_it_is_to_be_remapped(own, target):
    def run(size, vocab):
        return starting_from(own, target, size, vocab)

    assert inherited_vocab(run(37, "keep")).tolist() == DRAFT_VOCAB.tolist()
    assert inherited_vocab(run(37, "remap")) is None
    with pytest.raises(ConfigError, match=r"draft\.vocab_size: 30 .* has 37\. Set it to 37"):
        inherited_vocab(run(30, "keep"))
    pickled = published(own, own.parent / "pickled", "safeailab")
    assert inherited_vocab(starting_from(pickled, target)).tolist() == DRAFT_VOCAB.tolist()


@pytest.mark.parametrize("ids", [[2], [0, 7], [0, 1, 3], [0, 1, 2, 5, 6]])
def test_a_draft_reads_as_many_layers_as_it_is_told(tmp_path, target, ids):
    deeper = target.model_copy(update={"num_layers": 8})
    run = make_run(deeper, {"aux_layer_ids": ids, "fc_norm": len(ids) == 5})
    checkpoints = CheckpointFolder(tmp_path / "ckpt", {}, 10**6, 1)
    trainer = Eagle3Trainer(run, deeper, DRAFT_VOCAB, 4, checkpoints, CPU)
    width = len(ids) * HIDDEN
    samples = []
    for index, num_tokens in enumerate(SAMPLE_TOKENS):
        aux = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(index))
        samples.append(make_sample(index, num_tokens) | {"aux_hidden_states": aux})
    step = PreparedStep(1, (pack(samples),), (), (), sum(SAMPLE_TOKENS))
    losses = [trainer.train_step(step)().loss for _ in range(4)]
    assert losses[-1] < losses[0]
    trainer.export(tmp_path / "draft")
    validate_draft(tmp_path / "draft", deeper)
    loaded = load_draft(tmp_path / "draft")
    assert loaded.config.aux_layer_ids == tuple(ids)
    assert read_published(tmp_path / "draft", deeper).config == loaded.config
    trained = weights_of(trainer)
    for name, tensor in loaded.draft.state_dict().items():
        assert torch.equal(tensor, trained[f"draft.{name}"])
