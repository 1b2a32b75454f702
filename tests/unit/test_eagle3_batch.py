"""Packing, and the target's frozen ends as they are read from its files."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.eagle3_reference import (
    DRAFT_VOCAB,
    HIDDEN,
    VOCAB,
    make_head,
    make_sample,
    make_target,
)
from torchspec_lib.errors import ConfigError
from torchspec_lib.models.batch import empty_batch, pack
from torchspec_lib.models.chains import find_chains
from torchspec_lib.models.target_head import TargetHead, load_tensor


def test_samples_lie_one_after_the_other_with_positions_of_their_own():
    samples = [make_sample("011", 0), make_sample("1", 1), make_sample("00", 2)]
    batch = pack(samples).to(torch.device("cpu"))
    assert batch.doc_starts == (0, 3, 4, 6)
    assert batch.num_tokens == 6
    assert batch.chains.token_positions_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.input_ids_T.dtype == torch.int64
    assert batch.loss_mask_T.tolist() == [False, True, True, True, False, False]
    for i, sample in enumerate(samples):
        rows = slice(*batch.doc_starts[i : i + 2])
        assert torch.equal(batch.aux_states_TA[rows], sample["aux_hidden_states"])
        assert torch.equal(batch.last_states_TH[rows], sample["last_hidden_states"])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("loss_mask", torch.zeros(4, dtype=torch.bool)),
        ("aux_hidden_states", torch.zeros(3, HIDDEN)),
        ("last_hidden_states", torch.zeros(2, HIDDEN)),
        ("input_ids", torch.zeros(3)),
        ("loss_mask", torch.zeros(3, dtype=torch.uint8)),
    ],
)
def test_a_sample_that_does_not_fit_is_named(name, wrong):
    with pytest.raises(ValueError, match=rf"sample 1: .*{name}"):
        pack([make_sample("011", 0), make_sample("011", 1) | {name: wrong}])


def test_no_samples_and_samples_without_tokens_are_refused():
    with pytest.raises(ValueError, match="empty_batch"):
        pack([])
    with pytest.raises(ValueError, match="at least one token"):
        pack([make_sample("", 0)])


@pytest.mark.parametrize("seed", range(8))
def test_chains_are_found_as_a_loop_over_positions_finds_them(seed):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (6,), generator=random).tolist()
    starts = (0, *torch.tensor(lengths).cumsum(0).tolist())
    mask = torch.rand(starts[-1], generator=random) < 0.6
    expected = []
    for document, (start, end) in enumerate(pairwise(starts)):
        for i in range(start, end):
            life = 0
            while i + 2 + life < end and mask[i + 2 + life]:
                life += 1
            if life:
                expected.append((i, start, document, life))
    chains = find_chains(mask, starts)
    found = [chains.positions_C, chains.starts_C, chains.documents_C, chains.lives_C]
    assert list(zip(*(tensor.tolist() for tensor in found), strict=True)) == expected
    assert chains.num_chains == len(expected)
    for document, (first, end) in enumerate(pairwise(chains.bounds)):
        assert all(row[2] == document for row in expected[first:end])
    assert chains.extended(2).tolist() == [*(row[0] for row in expected), *[expected[-1][0]] * 2]


@pytest.mark.parametrize("masks", [["0"], ["1", "11"], ["000", "010"]])
def test_a_pack_without_supervision_has_one_chain_that_never_lives(masks):
    chains = pack([make_sample(mask, seed=0) for mask in masks]).chains
    assert chains.positions_C.tolist() == chains.lives_C.tolist() == [0]
    assert chains.bounds == (0, *[1] * len(masks))


def test_an_empty_batch_is_one_unsupervised_token():
    batch = empty_batch(48, HIDDEN, torch.bfloat16)
    assert (batch.num_tokens, batch.doc_starts) == (1, (0, 1))
    assert not batch.loss_mask_T.any()
    assert batch.aux_states_TA.dtype == batch.last_states_TH.dtype == torch.bfloat16
    assert (batch.aux_states_TA.shape, batch.last_states_TH.shape) == ((1, 48), (1, HIDDEN))


def write_target(folder, sharded, tied=False):
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator)}
    if not tied:
        tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator)
    if sharded:
        weight_map = {}
        for i, (name, tensor) in enumerate(tensors.items()):
            save_file({name: tensor, f"other.{i}": torch.zeros(1)}, folder / f"{i}.safetensors")
            weight_map[name] = f"{i}.safetensors"
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("sharded", [False, True])
def test_one_tensor_is_read_from_whole_and_sharded_models(tmp_path, sharded):
    tensors = write_target(tmp_path, sharded)
    for name, tensor in tensors.items():
        assert torch.equal(load_tensor(tmp_path, name), tensor)
    with pytest.raises(ConfigError, match="no tensor absent"):
        load_tensor(tmp_path, "absent")


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_holds_the_targets_tensors_and_trains_none(tmp_path, tied):
    tensors = write_target(tmp_path, sharded=False, tied=tied)
    target = make_target(path=str(tmp_path), tie_word_embeddings=tied)
    head = TargetHead.load(target, DRAFT_VOCAB, torch.float64)
    embed = tensors["model.embed_tokens.weight"].double()
    lm_head = embed if tied else tensors["lm_head.weight"].double()
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert (head.embed_VH is head.lm_head_VH) == tied
    assert torch.equal(head.embed(torch.tensor([3, 7])), embed[[3, 7]])
    states = torch.randn(9, HIDDEN, dtype=torch.float64)
    logits = states @ lm_head.T
    assert torch.allclose(head.teacher_logits(states), logits[:, DRAFT_VOCAB])
    assert torch.equal(head.target_ids(states), logits.argmax(-1))
    known = torch.isin(logits.argmax(-1), torch.from_numpy(DRAFT_VOCAB))
    assert torch.equal(head.knows_choices(states), known)
    assert TargetHead(embed, lm_head, None).knows_choices(states).all()


def test_draft_ids_are_minus_one_outside_the_draft_vocabulary():
    ids = make_head().draft_ids_V
    assert ids[torch.from_numpy(DRAFT_VOCAB)].tolist() == list(range(11))
    assert int((ids == -1).sum()) == VOCAB - 11
    assert make_head(pruned=False).draft_ids_V.tolist() == list(range(VOCAB))


def test_a_folder_whose_weights_are_not_its_configs_is_refused(tmp_path):
    write_target(tmp_path, sharded=False, tied=True)
    with pytest.raises(ConfigError, match="belong together"):
        TargetHead.load(make_target(path=str(tmp_path), vocab_size=24), None, torch.float32)
    with pytest.raises(ConfigError, match=r"no tensor lm_head\.weight"):
        TargetHead.load(make_target(path=str(tmp_path)), None, torch.float32)
    with pytest.raises(ConfigError, match="no tensor"):
        load_tensor(tmp_path / "elsewhere", "x")
