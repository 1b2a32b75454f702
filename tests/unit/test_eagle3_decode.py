"""Chains at evaluation, at training, and in the naive reference are the same chains."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.unit.eagle3_reference import (
    DRAFT_VOCAB,
    ROPES,
    make_config,
    make_draft,
    make_head,
    make_sample,
    naive,
)
from torchspec_lib.models.attention import Rotary, causal_attention, ttt_attention
from torchspec_lib.models.batch import pack
from torchspec_lib.models.chains import find_chains
from torchspec_lib.models.eagle3 import KeyValueCache, RMSNorm
from torchspec_lib.models.training_layer import TrainingLayer

STEPS = 5


@torch.no_grad()
def decode_chain(draft, head, sample, start, steps, cache):
    """Greedy, as evaluation does it: the target's states first, then a row at a time."""
    ids, first = sample["input_ids"].long(), cache.length
    positions = torch.arange(first, start + 1)
    states = draft.project(sample["aux_hidden_states"][first : start + 1])
    embeds = head.embed(ids[first + 1 : start + 2])
    tokens, all_logits = [], []
    for step in range(steps):
        out = draft.decode(embeds, states, positions, cache)
        all_logits.append(draft.logits(out[-1:])[0])
        tokens.append(int(DRAFT_VOCAB[int(all_logits[-1].argmax())]))
        embeds, states = head.embed(torch.tensor(tokens[-1:])), out[-1:]
        positions = torch.tensor([start + 1 + step])
    return tokens, all_logits


@torch.no_grad()
def training_logits(draft, head, sample, start, tokens):
    """Logits of chain ``start`` at every depth, in a sample that goes on with ``tokens``."""
    grown = make_sample("0" * (start + 2) + "1" * len(tokens), seed=77)
    for name, tensor in sample.items():
        if name != "loss_mask":
            grown[name][: start + 2] = tensor[: start + 2]
    grown["input_ids"][start + 2 :] = torch.tensor(tokens)
    batch = pack([make_sample("0110", seed=78), grown])
    chain = batch.chains.positions_C.tolist().index(4 + start)
    layer = TrainingLayer(draft, batch, head.embed(batch.input_ids_T.roll(-1)), len(tokens))
    outs = [layer.first(draft.project(batch.aux_states_TA))]
    for depth in range(1, len(tokens)):
        outs.append(layer.later(depth, draft.next_states(outs[-1])))
    return [draft.lm_head(draft.head_input(draft.next_states(out)))[chain] for out in outs]


@pytest.mark.parametrize(
    "changes", [{}, {"norm_output": True, "fc_norm": True}, {"num_key_value_heads": 1}]
)
def test_greedy_chains_of_decoding_training_and_the_naive_reference_agree(changes):
    draft, head = make_draft(make_config(**changes)), make_head()
    with torch.no_grad():  # else the residual rules, and the chain repeats its first token
        draft.midlayer.mlp.down_proj.weight.mul_(8)
        draft.midlayer.self_attn.o_proj.weight.mul_(4)
    sample, start = make_sample("0" * 9, seed=6), 6
    tokens, expected = naive(draft, head).greedy_chain(sample, start, STEPS)
    assert len(set(tokens)) > 2

    decoded, logits = decode_chain(draft, head, sample, start, STEPS, KeyValueCache())
    assert decoded == tokens
    for depth, row in enumerate(training_logits(draft, head, sample, start, tokens)):
        assert torch.allclose(logits[depth], expected[depth], rtol=0, atol=1e-9), depth
        assert torch.allclose(row, expected[depth], rtol=0, atol=1e-9), depth


def test_a_cache_truncated_after_a_rejected_chain_goes_on_as_if_it_had_never_been():
    draft, head = make_draft(make_config()), make_head()
    sample, cache = make_sample("0" * 12, seed=6), KeyValueCache()
    decode_chain(draft, head, sample, 5, STEPS, cache)
    assert cache.length == 5 + STEPS
    cache.truncate(6)
    continued = decode_chain(draft, head, sample, 9, STEPS, cache)
    fresh = decode_chain(draft, head, sample, 9, STEPS, KeyValueCache())
    assert continued[0] == fresh[0]
    assert torch.allclose(torch.stack(continued[1]), torch.stack(fresh[1]), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(99)


@pytest.mark.parametrize("rope", ROPES)
def test_rotation_equals_the_one_of_transformers(rope):
    config = make_config(rope=rope)
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
    )
    x = torch.randn(100, 4, config.head_dim)
    cos, sin = theirs(x, torch.arange(100)[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    rotated = Rotary(config).rotate(x, torch.arange(100))
    assert torch.allclose(rotated, expected[0].transpose(0, 1), atol=1e-5)
    if rope != "default":
        assert not torch.allclose(rotated, Rotary(make_config()).rotate(x, torch.arange(100)))


def test_attention_equals_torchs_own_for_documents_without_later_depths():
    q, k, v = torch.randn(13, 4, 6), torch.randn(13, 2, 6), torch.randn(13, 2, 6)
    starts = (0, 5, 6, 13)
    document = torch.tensor([0] * 5 + [1] + [2] * 7)
    allowed = (document[:, None] == document) & torch.ones(13, 13).tril().bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), allowed, scale=0.3, enable_gqa=True
    )
    chains = find_chains(torch.ones(13, dtype=torch.bool), starts)
    rows = chains.positions_C
    assert len(rows) == 8
    chosen = ttt_attention(q[rows], [k], [v], chains, starts, 0.3)
    assert torch.allclose(chosen, expected.transpose(0, 1)[rows], atol=1e-6)
    last = causal_attention(q[9:], k[6:], v[6:], 0.3)
    assert torch.allclose(last, expected.transpose(0, 1)[9:], atol=1e-6)


def test_attention_and_norm_in_bf16_are_exact_but_for_the_rounding_of_their_results():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(300, 2, 64, generator=generator).bfloat16() for _ in range(3))
    exact = causal_attention(q.double(), k.double(), v.double(), 0.3)
    error = (causal_attention(q, k, v, 0.3).double() - exact).norm() / exact.norm()
    assert error < 0.0025

    x, norm = q.flatten(1), RMSNorm(128, 1e-5)
    exact = norm.double()(x.double())
    error = (norm.bfloat16()(x).double() - exact).norm() / exact.norm()
    assert error < 0.0025
