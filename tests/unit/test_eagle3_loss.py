"""The loss, its gradients and the acceptance counts, against the naive reference."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.unit.eagle3_reference import (
    DRAFT_VOCAB,
    HIDDEN,
    NUM_AUX,
    NaiveDraft,
    make_config,
    make_draft,
    make_head,
    make_sample,
    naive,
)
from torchspec_lib.models.batch import empty_batch, pack
from torchspec_lib.models.head_loss import loss_of_rows_
from torchspec_lib.models.ttt import Eagle3Model, supervise

DECAY = 0.8
MASKS = ["0011101100111", "01110", "00000111", "0", "111011111", "01"]
"""Odd lengths, several spans, spans that end before and with the sample, and no span at all."""


def random_samples(masks=MASKS, dtype=torch.float64):
    return [make_sample(mask, seed=10 + i, dtype=dtype) for i, mask in enumerate(masks)]


def run(draft, head, batches, ttt_steps, reduction="token"):
    """One step over micro-batches, as a trainer takes it: denominators first, then backward."""
    model = Eagle3Model(draft, ttt_steps)
    model.zero_grad()
    sups = [supervise(batch, head, ttt_steps, reduction) for batch in batches]
    weight_sums = sum(sup.weight_sums_K for sup in sups)
    scale = DECAY ** torch.arange(ttt_steps).double() / weight_sums.clamp(min=1)
    total, sums = 0.0, []
    for batch, sup in zip(batches, sups, strict=True):
        loss, depth_sums = model(batch, head, sup, scale)
        loss.backward()
        total += loss.item()
        sums.append(depth_sums)
    return total, {name: p.grad.clone() for name, p in draft.named_parameters()}, sums, sups


def assert_same_grads(grads, expected, tolerance=1e-9):
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert grad.double().isfinite().all(), name
        error = (grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, f"{name} is {error:.1e} off"


@pytest.mark.parametrize(
    ("pruned", "reduction", "changes"),
    [
        (False, "token", {}),
        (True, "token", {}),
        (True, "sample", {}),
        (False, "sample", {"fc_norm": True}),
        (True, "token", {"fc_norm": True, "norm_output": True}),
        (True, "token", {"num_key_value_heads": 4, "hidden_act": "silu"}),
        (True, "token", {"num_key_value_heads": 1}),
    ],
)
def test_loss_and_every_gradient_equal_the_naive_reference(pruned, reduction, changes):
    draft, head = make_draft(make_config(pruned, **changes)), make_head(pruned)
    samples = random_samples()

    reference = naive(draft, head)
    expected = reference.loss(samples, ttt_steps=4, reduction=reduction)
    total, grads, [sums], [sup] = run(draft, head, [pack(samples)], 4, reduction)

    assert total == pytest.approx(expected.total(DECAY).item(), rel=1e-10)
    assert sums.loss_K.tolist() == pytest.approx([x.item() for x in expected.loss_sums], rel=1e-10)
    assert sup.weight_sums_K.tolist() == pytest.approx(expected.weight_sums)
    assert sums.chains_K.tolist() == expected.chains
    assert sums.matches_K.tolist() == expected.matches
    assert_same_grads(grads, reference.backward(expected.total(DECAY)))


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_every_rotary_embedding_advances_with_the_depth(rope):
    config = make_config(rope=rope)
    draft, head = make_draft(config), make_head()
    samples = random_samples(["0" * 17 + "111111"])
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
    )
    reference = NaiveDraft(draft, head, theirs.inv_freq, theirs.attention_scaling)
    expected = reference.loss(samples, 3, "token")
    total, grads, _, _ = run(draft, head, [pack(samples)], 3)
    assert total == pytest.approx(expected.total(DECAY).item(), rel=1e-10)
    assert_same_grads(grads, reference.backward(expected.total(DECAY)))


def supervised_positions(batch, head, ttt_steps):
    supervised_KC = supervise(batch, head, ttt_steps, "token").supervised_KC
    return [batch.chains.positions_C[row].tolist() for row in supervised_KC]


def test_the_mask_00111111_supervises_6_5_and_4_chains():
    head, batch = make_head(pruned=False), pack([make_sample("00111111", seed=3)])
    sup = supervise(batch, head, 3, "token")
    assert sup.supervised_KC.sum(-1).tolist() == [6, 5, 4]
    assert supervised_positions(batch, head, 3) == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3],
    ]
    assert sup.weight_sums_K.tolist() == [6, 5, 4]


def test_a_span_that_ends_early_supervises_no_chain_across_the_gap():
    batch = pack([make_sample("0011011", seed=3)])
    assert supervised_positions(batch, make_head(pruned=False), 3) == [[0, 1, 3, 4], [0, 3], []]


def test_packed_samples_give_the_loss_and_gradients_of_separate_ones():
    draft, head, samples = make_draft(make_config()), make_head(), random_samples()
    packed, packed_grads, [packed_sums], _ = run(draft, head, [pack(samples)], 3, "sample")
    alone, alone_grads, alone_sums, _ = run(draft, head, [pack([s]) for s in samples], 3, "sample")
    assert packed == pytest.approx(alone, rel=1e-12)
    assert_same_grads(packed_grads, alone_grads, 1e-12)
    assert packed_sums.matches_K.tolist() == sum(sums.matches_K for sums in alone_sums).tolist()


def test_a_sample_weighs_alike_at_any_length_under_the_sample_reduction():
    head = make_head()
    batch = pack(random_samples(["0" + "1" * 40, "0" + "1" * 15]))
    sup = supervise(batch, head, 2, "sample")
    for weights in sup.weights_KC:
        lengths = [int((weights[batch.chains.documents_C == d] > 0).sum()) for d in (0, 1)]
        assert 1 < lengths[1] < lengths[0]
        for document in (0, 1):
            in_document = batch.chains.documents_C == document
            assert weights[in_document].sum().item() == pytest.approx(1)
    assert sup.weight_sums_K.tolist() == pytest.approx([2, 2])


@pytest.mark.parametrize("reduction", ["token", "sample"])
@pytest.mark.parametrize("changes", [{}, {"fc_norm": True, "norm_output": True}])
def test_a_batch_without_supervision_gives_zero_and_gradients_of_zeros(reduction, changes):
    draft, head = make_draft(make_config(**changes)), make_head()
    unsupervised = pack(random_samples(["00000", "10", "01"]))
    placeholder = empty_batch(NUM_AUX * HIDDEN, HIDDEN, torch.float64)
    for batch in (unsupervised, placeholder):
        total, grads, [sums], [sup] = run(draft, head, [batch], 3, reduction)
        assert total == 0.0
        assert all((grad == 0).all() for grad in grads.values())
        assert sup.weight_sums_K.tolist() == sums.chains_K.tolist() == [0, 0, 0]


def test_a_choice_outside_the_draft_vocabulary_is_a_miss_without_a_loss():
    draft, head = make_draft(make_config()), make_head()
    batch = pack([make_sample("0" + "1" * 60, seed=4)])
    outside = ~torch.isin(head.target_ids(batch.last_states_TH), torch.from_numpy(DRAFT_VOCAB))
    sup = supervise(batch, head, 2, "token")
    trained = [i for i in range(59) if not outside[i + 1]]
    assert 0 < len(trained) < 59
    assert sup.weights_KC[0].nonzero()[:, 0].tolist() == trained
    assert sup.weight_sums_K[0] == len(trained)
    _, sums = Eagle3Model(draft, 2)(batch, head, sup, torch.ones(2))
    assert sums.chains_K[0] == 59
    assert sums.matches_K[0] <= len(trained)


def test_depth_1_counts_only_chains_that_were_right_at_depth_0():
    """The draft always says token 5; the target's choices are set by its states."""
    draft, head = make_draft(make_config(pruned=False)), make_head(pruned=False)
    with torch.no_grad():
        always_5 = draft.norm.weight.new_zeros(HIDDEN)
        always_5[0] = 1.0
        draft.project = lambda aux: always_5.expand(len(aux), -1)
        draft.midlayer.mlp.down_proj.weight.zero_()
        draft.midlayer.self_attn.o_proj.weight.zero_()
        draft.norm.weight.fill_(1.0)
        draft.lm_head.weight.zero_()
        draft.lm_head.weight[5] = always_5
    sample = make_sample("0" + "1" * 7, seed=5)
    chosen = torch.tensor([0, 5, 5, 1, 5, 5, 5, 0])  # chain i reads 1 + i at depth 0, 2 + i at 1
    unlike_others = torch.linalg.pinv(head.lm_head_VH.detach())  # [H, V]
    sample["last_hidden_states"] = 9 * unlike_others.T[chosen]
    batch = pack([sample])
    assert head.target_ids(batch.last_states_TH).tolist() == chosen.tolist()
    _, sums = Eagle3Model(draft, 3)(batch, head, supervise(batch, head, 3, "token"), torch.ones(3))
    assert sums.chains_K.tolist() == [6, 4, 2]  # chain 5 has no depth 1, 4 and 5 no depth 2
    assert sums.matches_K.tolist() == [5, 3, 1]


def test_gradients_in_bf16_are_within_2_percent_of_float64():
    """As FSDP's mixed precision computes: everything in bf16 but softmax, norms and sums."""
    config, head = make_config(), make_head(dtype=torch.bfloat16)
    samples = random_samples([*MASKS, "0" + "1" * 50], torch.bfloat16)
    worst, overall = [], []
    for seed in (0, 1, 4):
        draft = make_draft(config, torch.bfloat16, seed)
        reference = naive(draft, head)
        expected = reference.loss(samples, 3, "token")
        total, grads, _, _ = run(draft, head, [pack(samples)], 3)
        assert total == pytest.approx(expected.total(DECAY).item(), rel=0.01)
        exact = reference.backward(expected.total(DECAY))
        errors = {name: grad.double() - exact[name] for name, grad in grads.items()}
        worst.append(max(float(errors[name].norm() / exact[name].norm()) for name in grads))
        both = [torch.cat([g.flatten() for g in part.values()]) for part in (errors, exact)]
        overall.append(float(both[0].norm() / both[1].norm()))
    assert max(worst) < 0.04
    assert sum(overall) / len(overall) < 0.02


def test_the_gradient_of_a_large_vocabulary_is_exact_but_for_the_rounding_of_its_result():
    """A good draft's gradient is a small difference: softmax in bf16 loses a fifth of it."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(4, 8192, generator=generator)
    draft = teacher + 0.2 * torch.randn(4, 8192, generator=generator)
    teacher, draft = teacher.bfloat16(), draft.bfloat16()
    exact = draft.double().softmax(-1) - teacher.double().softmax(-1)
    loss_of_rows_(draft, teacher, torch.ones(4))
    assert (draft.double() - exact).norm() < 0.003 * exact.norm()


def test_weights_in_half_precision_are_refused():
    draft, head = make_draft(make_config()), make_head()
    batch = pack(random_samples())
    sup = supervise(batch, head, 2, "token")
    with pytest.raises(ValueError, match="cast_forward_inputs"):
        Eagle3Model(draft, 2)(batch, head, sup, torch.ones(2, dtype=torch.bfloat16))


def test_the_loss_of_a_row_is_least_where_the_draft_equals_its_teacher():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    losses, choices = loss_of_rows_(logits.clone(), logits, torch.ones(2))
    assert torch.allclose(losses, entropy)
    assert choices[0] == 1
    shifted = logits + torch.tensor([0.1, 0.0, 0.0])
    assert (loss_of_rows_(shifted, logits, torch.ones(2))[0] > entropy).all()


def test_a_forward_without_gradients_has_the_same_loss_and_counts():
    draft, head, batch = make_draft(make_config()), make_head(), pack(random_samples())
    model, sup = Eagle3Model(draft, 3), supervise(batch, head, 3, "token")
    trained, sums = model(batch, head, sup, torch.ones(3))
    with torch.no_grad():
        evaluated, same_sums = model(batch, head, sup, torch.ones(3))
    assert not evaluated.requires_grad
    assert evaluated == trained.detach()
    assert torch.equal(sums.matches_K, same_sums.matches_K)
