"""Trees of a draft: what is proposed, what of it is accepted, and what the target keeps of it."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Gemma2Config

from tests.tiny_targets import FAMILIES, SIZES
from tests.unit.eagle3_reference import make_config, make_draft
from torchspec_lib.errors import ConfigError
from torchspec_lib.evaluation.drafting import ChainDrafter, DraftTree
from torchspec_lib.evaluation.speculative import SpeculativeDecoder, decode_plain
from torchspec_lib.evaluation.tree_drafting import TreeDrafter, TreeShape
from torchspec_lib.evaluation.verification import TargetChoice, check_tree_target
from torchspec_lib.models.eagle3 import KeyValueCache

VOCAB, WIDTH, AUX = SIZES["vocab_size"], SIZES["hidden_size"], (1, 3, 4)
DRAFT_VOCAB = np.arange(1, VOCAB, 2)
PROMPTS = ([5, 11], [3, 1, 4, 1, 5, 9, 2, 6], [90, 17, 33])
SHAPES = (TreeShape(1, 3, 4), TreeShape(3, 2, 5), TreeShape(4, 3, 12), TreeShape(2, 4, 21))


def draft_for(pruned=False, **changes):
    config = make_config(
        hidden_size=WIDTH,
        target_hidden_size=WIDTH,
        vocab_size=VOCAB,
        draft_vocab_size=len(DRAFT_VOCAB) if pruned else VOCAB,
        aux_layer_ids=AUX,
        **changes,
    )
    return make_draft(config)


@pytest.fixture(scope="module")
def targets():
    """Float64, so that no near tie is decided by rounding."""
    made = {}
    for family, build in FAMILIES.items():
        torch.manual_seed(0)
        made[family] = build().double().eval()
        made[family].set_experts_implementation("eager")  # the only one in float64
        with torch.no_grad():  # else attention hardly matters
            for name, parameter in made[family].named_parameters():
                parameter.mul_(4.0) if parameter.ndim > 1 and "gate.weight" not in name else None
    return made


@pytest.fixture(scope="module")
def embed():
    torch.manual_seed(1)
    return nn.Embedding(VOCAB, WIDTH).double()


class TreeOracle:
    """Knows the answer, and hides it among wrong tokens: on each depth another place is right."""

    def __init__(self, answer, num_prompt_tokens, wrong_every=0):
        self.answer, self.num_prompt_tokens = answer, num_prompt_tokens
        self.wrong_every = wrong_every

    def start(self):
        self.num_seen = 1 - self.num_prompt_tokens

    def propose(self, token_ids, aux_TA):
        self.num_seen += len(token_ids)
        coming = (self.answer + [0] * 4)[self.num_seen :][:4]
        tokens, parents, right = [], [], 0
        for depth, token in enumerate(coming):
            is_missing = self.wrong_every and (self.num_seen + depth) % self.wrong_every == 0
            place = (self.num_seen + depth) % 3
            first = len(tokens) + 1
            tokens += [
                token if i == place and not is_missing else (token + 1 + i) % VOCAB
                for i in range(3)
            ]
            parents += [right] * 3
            right = first + place
        return DraftTree(tuple(tokens), tuple(parents))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_leave_the_output_as_it_is_whatever_is_accepted_of_them(targets, family, temperature):
    model, choose = targets[family], TargetChoice(temperature, 24)
    accepted = set()
    for prompt, wrong_every in product(PROMPTS, range(5)):
        plain = decode_plain(model, prompt, choose, ())
        oracle = TreeOracle(plain, len(prompt), wrong_every)
        decoded = SpeculativeDecoder(model, choose, AUX, oracle).decode(prompt, ())
        assert decoded.token_ids == plain
        assert decoded.counts.num_new_tokens == 24
        accepted.update(decoded.accepted)
    assert accepted >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_a_drafts_trees_leave_the_output_as_it_is(targets, shape, temperature):
    model, choose = targets["qwen3"], TargetChoice(temperature, 24)
    draft = draft_for(pruned=True)
    drafter = TreeDrafter(draft, model.get_input_embeddings(), DRAFT_VOCAB, shape)
    decoder = SpeculativeDecoder(model, choose, AUX, drafter)
    for prompt in PROMPTS:
        decoded = decoder.decode(prompt, ())
        assert decoded.token_ids == decode_plain(model, prompt, choose, ())


def test_an_end_inside_a_tree_ends_the_output_there(targets):
    model, choose = targets["llama"], TargetChoice(0.0, 20)
    for prompt in PROMPTS:
        plain = decode_plain(model, prompt, choose, ())
        for place in range(8):
            eos = {plain[place]}
            decoder = SpeculativeDecoder(model, choose, AUX, TreeOracle(plain, len(prompt)))
            assert decoder.decode(prompt, eos).token_ids == plain[: plain.index(plain[place]) + 1]


def drafted(drafter, calls=4):
    """What is proposed along a document, whose newest tokens come a few at a time."""
    generator = torch.Generator().manual_seed(5)
    drafter.start()
    for count in range(1, calls + 1):
        tokens = torch.randint(VOCAB, (count,), generator=generator).tolist()
        aux = torch.randn(count, 3 * WIDTH, dtype=torch.float64, generator=generator)
        with torch.inference_mode():
            tree = drafter.propose(tokens, aux)
        yield tokens, aux, tree


@pytest.mark.parametrize("changes", [{}, {"fc_norm": True, "norm_output": True}])
@pytest.mark.parametrize("pruned", [False, True])
def test_trees_of_one_branch_are_the_chain(embed, pruned, changes):
    draft, vocab = draft_for(pruned, **changes), DRAFT_VOCAB if pruned else None
    chains = drafted(ChainDrafter(draft, embed, vocab, 5))
    trees = drafted(TreeDrafter(draft, embed, vocab, TreeShape(5, 1, 6)))
    for (*_, chain), (*_, tree) in zip(chains, trees, strict=True):
        assert tree == chain
        assert tree.is_chain


def naive_tree(draft, embed, tokens, aux, shape):
    """Paths [token ids] of the tree: every node runs the whole document again, by itself."""

    def log_probs(path):
        states = draft.project(aux)
        for end in range(len(path) + 1):
            ids = torch.tensor([*tokens, *path[:end]])
            out = draft.decode(embed(ids), states, torch.arange(len(ids)), KeyValueCache())
            states = torch.cat([states, out[-1:]])
        return draft.logits(out)[-1].log_softmax(-1).tolist()

    tried, followed = {}, {(): 0.0}
    for _ in range(shape.steps):
        fresh = {}
        for path, score in followed.items():
            likely = sorted(enumerate(log_probs(path)), key=lambda pair: -pair[1])[: shape.topk]
            fresh |= {(*path, int(DRAFT_VOCAB[i])): score + log_prob for i, log_prob in likely}
        tried |= fresh
        followed = dict(sorted(fresh.items(), key=lambda pair: -pair[1])[: shape.topk])
    return set(sorted(tried, key=lambda path: -tried[path])[: shape.num_draft_tokens - 1])


def paths(tree):
    rows = [()]
    for token, parent in zip(tree.token_ids, tree.parents, strict=True):
        rows.append((*rows[parent], token))
    return rows[1:]


@pytest.mark.parametrize("changes", [{}, {"fc_norm": True, "norm_output": True}])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_holds_the_likeliest_paths_of_those_that_a_naive_search_tries(embed, shape, changes):
    draft, tokens, aux = draft_for(pruned=True, **changes), [], torch.empty(0, 3 * WIDTH)
    for new_tokens, new_aux, tree in drafted(TreeDrafter(draft, embed, DRAFT_VOCAB, shape)):
        tokens, aux = tokens + new_tokens, torch.cat([aux, new_aux])
        assert len(tree.token_ids) == shape.num_draft_tokens - 1
        assert len(set(paths(tree))) == len(tree.token_ids)
        assert set(paths(tree)) == naive_tree(draft, embed, tokens, aux, shape)


def test_the_path_that_is_accepted_is_the_one_the_target_takes():
    tree = DraftTree((7, 8, 7, 9, 9), (0, 0, 2, 2, 3))  # 7 | 8 -> 7 -> 9 | 8 -> 9
    assert tree.depths() == [0, 1, 1, 2, 2, 3]
    assert tree.accepted_rows([8, 0, 7, 9, 0, 5]) == [0, 2, 3, 5]
    assert tree.accepted_rows([8, 0, 9, 9, 1, 5]) == [0, 2, 4]
    assert tree.accepted_rows([6, 7, 8, 9, 9, 9]) == [0]


def test_a_target_that_forgets_is_refused_for_trees(targets):
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=8)
    with pytest.raises(ConfigError, match="sliding_attention"):
        check_tree_target(config)
    for model in targets.values():
        check_tree_target(model.config)


def test_more_branches_than_the_draft_has_tokens_are_refused(embed):
    with pytest.raises(ConfigError, match="exceeds the draft's 48 tokens"):
        TreeDrafter(draft_for(pruned=True), embed, DRAFT_VOCAB, TreeShape(2, 49, 9))
