"""Speculative decoding with a small random target: the same tokens as plain decoding, always."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torchspec_lib.evaluation.drafting import ChainDrafter, DraftTree
from torchspec_lib.evaluation.speculative import SpeculativeDecoder, decode_plain
from torchspec_lib.evaluation.verification import TargetChoice
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.eagle3 import Eagle3Draft, KeyValueCache

VOCAB, AUX, STEPS = 64, (0, 1, 3), 4
DRAFT_VOCAB = np.arange(1, VOCAB, 2)


@pytest.fixture(scope="module")
def model():
    """Float64, so that no near tie is decided by rounding."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


def make_draft(draft_vocab_size, **changes):
    torch.manual_seed(3)
    config = DraftModelConfig(
        hidden_size=32,
        target_hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        vocab_size=VOCAB,
        draft_vocab_size=draft_vocab_size,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        aux_layer_ids=AUX,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(2,),
        **changes,
    )
    return Eagle3Draft(config).double().eval()


def prompts(count=4):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in range(2, 2 + count)]


class Oracle:
    """Knows the whole answer; every ``wrong_every``-th proposal is another token."""

    def __init__(self, answer, num_prompt_tokens, draft_steps, wrong_every=0):
        self.answer, self.draft_steps, self.wrong_every = answer, draft_steps, wrong_every
        self.num_prompt_tokens, self.calls = num_prompt_tokens, []

    def start(self):
        self.num_seen = 1 - self.num_prompt_tokens

    def propose(self, token_ids, aux_TA):
        self.num_seen += len(token_ids)
        self.calls.append((list(token_ids), aux_TA))
        coming = (self.answer + [0] * self.draft_steps)[self.num_seen :][: self.draft_steps]
        return DraftTree.chain(
            [
                (token + 1) % VOCAB
                if self.wrong_every and (self.num_seen + i) % self.wrong_every == 0
                else token
                for i, token in enumerate(coming)
            ]
        )


def greedy(max_new_tokens):
    return TargetChoice(0.0, max_new_tokens)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("pruned", [False, True])
def test_any_draft_leaves_the_output_as_it_is(model, pruned, max_new_tokens):
    vocab = DRAFT_VOCAB if pruned else None
    draft = make_draft(len(DRAFT_VOCAB) if pruned else VOCAB)
    drafter = ChainDrafter(draft, model.get_input_embeddings(), vocab, STEPS)
    decoder = SpeculativeDecoder(model, greedy(max_new_tokens), AUX, drafter)
    for prompt in prompts():
        plain = decode_plain(model, prompt, greedy(max_new_tokens), ())
        decoded = decoder.decode(prompt, ())
        assert decoded.token_ids == plain
        assert len(plain) == max_new_tokens
        assert decoded.counts.num_new_tokens == max_new_tokens


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("drafter", ["draft", "oracle"])
def test_sampling_with_a_draft_gives_the_answer_that_sampling_without_it_gives(
    model, temperature, drafter
):
    choose = TargetChoice(temperature, 40)
    for prompt in prompts():
        plain = decode_plain(model, prompt, choose, ())
        assert plain != decode_plain(model, prompt, greedy(40), ())
        if drafter == "oracle":
            proposes = Oracle(plain, len(prompt), STEPS, wrong_every=3)
        else:
            proposes = ChainDrafter(make_draft(VOCAB), model.get_input_embeddings(), None, STEPS)
        decoded = SpeculativeDecoder(model, choose, AUX, proposes).decode(prompt, ())
        assert decoded.token_ids == plain
        assert decoded.counts.num_new_tokens == 40


def test_tokens_are_drawn_as_often_as_the_target_has_them_likely_at_that_temperature():
    choose = TargetChoice(0.5, 20_000)
    choose.start([1, 2, 3])
    logits = torch.tensor([0.0, 1.0, -1.0, float("-inf"), 0.5])
    drawn = choose(logits.expand(20_000, 5), range(20_000))
    shares = np.bincount(drawn, minlength=5) / 20_000
    assert shares[3] == 0.0
    assert np.abs(shares - (logits / 0.5).softmax(-1).numpy()).max() < 0.01


def test_another_prompt_or_seed_draws_other_numbers_and_the_same_ones_draw_the_same():
    def draw(seed, prompt):
        choose = TargetChoice(1.0, 50, seed)
        choose.start(prompt)
        return choose(torch.zeros(50, VOCAB), range(50))

    assert draw(0, [1, 2]) == draw(0, [1, 2])
    assert len({tuple(draw(*case)) for case in ((0, [1, 2]), (0, [1, 3]), (1, [1, 2]))}) == 3


def test_plain_decoding_equals_generate_of_transformers(model):
    prompt = prompts()[2]
    out = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert decode_plain(model, prompt, greedy(20), ()) == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("max_new_tokens", [3, 21, 22, 25, 26])
def test_a_draft_that_is_always_right_gives_k_plus_one_tokens_a_forward(model, max_new_tokens):
    for prompt in prompts(2):
        plain = decode_plain(model, prompt, greedy(max_new_tokens), ())
        decoder = SpeculativeDecoder(
            model, greedy(max_new_tokens), AUX, Oracle(plain, len(prompt), STEPS)
        )
        decoded = decoder.decode(prompt, ())
        assert decoded.token_ids == plain
        assert len(decoded.accepted) == -(-(max_new_tokens - 1) // (STEPS + 1))
        assert set(decoded.accepted[:-1]) <= {STEPS}
        assert decoded.counts.num_new_tokens == max_new_tokens


@pytest.mark.parametrize("wrong_every", [2, 3, 4])
def test_chains_that_are_right_in_part_are_accepted_in_part(model, wrong_every):
    prompt = prompts()[1]
    plain = decode_plain(model, prompt, greedy(30), ())
    oracle = Oracle(plain, len(prompt), STEPS, wrong_every)
    decoded = SpeculativeDecoder(model, greedy(30), AUX, oracle).decode(prompt, ())
    assert decoded.token_ids == plain
    assert 0 < max(decoded.accepted) < STEPS + 1
    assert min(decoded.accepted) < STEPS


@pytest.mark.parametrize("wrong_every", [0, 3])
def test_an_end_inside_a_chain_ends_the_output_there(model, wrong_every):
    for prompt in prompts():
        plain = decode_plain(model, prompt, greedy(30), ())
        for place in range(12):
            eos = {plain[place]}
            ended = decode_plain(model, prompt, greedy(30), eos)
            assert ended == plain[: plain.index(plain[place]) + 1]
            oracle = Oracle(plain, len(prompt), STEPS, wrong_every)
            decoded = SpeculativeDecoder(model, greedy(30), AUX, oracle).decode(prompt, eos)
            assert decoded.token_ids == ended
            assert decoded.counts.num_new_tokens == len(ended)


def test_the_drafter_gets_each_token_with_the_targets_states_of_the_position_before(model):
    prompt = prompts()[3]
    plain = decode_plain(model, prompt, greedy(20), ())
    oracle = Oracle(plain, len(prompt), STEPS, wrong_every=3)
    SpeculativeDecoder(model, greedy(20), AUX, oracle).decode(prompt, ())

    tokens = [token for call, _ in oracle.calls for token in call]
    document = prompt + plain
    assert tokens == document[1 : len(tokens) + 1]
    with torch.inference_mode():
        out = model(torch.tensor([document]), output_hidden_states=True)
        expected = torch.cat([out.hidden_states[layer + 1][0] for layer in AUX[:-1]], -1)
    seen = torch.cat([aux for _, aux in oracle.calls])
    width = expected.shape[-1]
    assert torch.allclose(seen[:, :width], expected[: len(tokens)], rtol=0, atol=1e-10)


def chain_from_scratch(draft, embed, tokens, aux):
    """Every step runs the whole document again, without a cache that could be wrong."""
    chain, states = [], draft.project(aux)
    for _ in range(STEPS):
        embeds = embed(torch.tensor(tokens + chain))
        positions = torch.arange(len(embeds))
        out = draft.decode(embeds, states, positions, KeyValueCache())
        chain.append(int(DRAFT_VOCAB[draft.logits(out)[-1].argmax()]))
        states = torch.cat([states, out[-1:]])
    return chain


@pytest.mark.parametrize("changes", [{}, {"norm_output": True, "fc_norm": True}])
def test_chains_follow_from_the_document_whatever_was_proposed_before(model, changes):
    draft = make_draft(len(DRAFT_VOCAB), **changes)
    with torch.no_grad():  # else attention hardly matters
        draft.midlayer.self_attn.o_proj.weight.mul_(16)
        draft.midlayer.self_attn.q_proj.weight.mul_(4)
        draft.midlayer.mlp.down_proj.weight.mul_(8)
    embed, generator = model.get_input_embeddings(), torch.Generator().manual_seed(5)
    drafter, chains = ChainDrafter(draft, embed, DRAFT_VOCAB, STEPS), set()
    for _ in range(4):
        tokens = torch.randint(VOCAB, (12,), generator=generator).tolist()
        aux = torch.randn(12, 3 * 32, dtype=torch.float64, generator=generator)
        drafter.start()
        for start, end in ((0, 4), (4, 5), (5, 9), (9, 12)):
            with torch.inference_mode():
                chain = drafter.propose(tokens[start:end], aux[start:end])
                assert chain.is_chain
                assert list(chain.token_ids) == chain_from_scratch(
                    draft, embed, tokens[:end], aux[:end]
                )
            chains.add(chain.token_ids)
    assert len(chains) > 10
