"""What makes a training step fast, piece by piece; test_eagle3_loss.py judges the whole."""

import gc

import pytest
import torch

from tests.unit.eagle3_reference import make_config, make_draft, make_head, make_sample
from torchspec_lib.models import head_loss as head_loss_module
from torchspec_lib.models.batch import pack
from torchspec_lib.models.head_loss import head_loss
from torchspec_lib.models.shared import Shared, shared_linear, shared_rows
from torchspec_lib.models.training_layer import SharedMLP
from torchspec_lib.models.ttt import Eagle3Model, supervise

DEPTHS = 5


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def test_gradients_of_a_shared_weight_are_summed_over_its_uses_in_float32(random):
    """Many small terms on a large one: bf16 sums would lose all of them."""
    weight = torch.randn(6, 4, generator=random).bfloat16().requires_grad_()
    shared = Shared(weight)
    xs = [torch.randn(3, 4, generator=random).bfloat16() * scale for scale in (64, *[0.1] * 40)]
    total = sum(shared_linear(x, shared).float().sum() for x in xs)
    total.backward()
    exact = sum(x.double().sum(0) for x in xs).expand(6, 4)
    assert (weight.grad.double() - exact).norm() < 2**-8 * exact.norm()


def test_uses_of_a_shared_tensor_have_the_gradients_of_plain_ones(random):
    weight = torch.randn(6, 4, generator=random, dtype=torch.float64)
    x = torch.randn(3, 4, generator=random, dtype=torch.float64)

    def run(use_shared):
        leaf, state, total = weight.clone().requires_grad_(), x.clone().requires_grad_(), 0.0
        scaled = 2 * leaf
        shared = Shared(scaled)
        for depth in range(3):
            if use_shared:
                part = shared_linear(state, shared, slice(1, 5))
                rows = shared_rows(shared, depth, 3)
            else:
                part, rows = state @ scaled[1:5].T, scaled[depth : depth + 3]
            total = total + (part.sin() * (depth + 1)).sum() + rows.cos().sum()
        total.backward()
        return total.item(), leaf.grad, state.grad

    for ours, theirs in zip(run(True), run(False), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_shared_mlp_has_the_gradients_of_the_module(recompute, random):
    mlp = make_draft(make_config()).midlayer.mlp
    xs = [torch.randn(7, 16, generator=random, dtype=torch.float64) for _ in range(3)]

    def run(call):
        mlp.zero_grad()
        inputs = [x.clone().requires_grad_() for x in xs]
        sum(call(x).sin().sum() for x in inputs).backward()
        return [x.grad for x in inputs] + [p.grad for p in mlp.parameters()]

    for ours, theirs in zip(run(SharedMLP(mlp, recompute)), run(mlp), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_recomputation_keeps_no_wide_activation(random):
    mlp = make_draft(make_config()).midlayer.mlp
    x = torch.randn(7, 16, generator=random, dtype=torch.float64, requires_grad=True)
    kept = {flag: SharedMLP(mlp, flag)(x).grad_fn.saved_tensors for flag in (False, True)}
    assert [tuple(t.shape) for t in kept[True]] == [(7, 16)]
    assert len(kept[False]) == 3


@pytest.mark.parametrize("most_logits", [1, 30, 10**9])
def test_blocks_of_the_head_change_neither_the_loss_nor_a_gradient(
    most_logits, random, monkeypatch
):
    vocab, width, chains = 11, 8, 7
    monkeypatch.setattr(head_loss_module, "BLOCK_LOGITS", most_logits)

    def noise(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    teacher, weights = noise(chains + DEPTHS - 1, vocab), noise(DEPTHS, chains).relu()
    leaves = [noise(vocab, width), *(noise(chains, width) for _ in range(DEPTHS))]
    weight, *states = (leaf.requires_grad_() for leaf in leaves)
    said = head_loss(states, weight, teacher, weights)
    (3 * said.total).backward()
    ours, total = [leaf.grad.clone() for leaf in (weight, *states)], 0.0
    for leaf in (weight, *states):
        leaf.grad = None
    for depth, state in enumerate(states):
        logits = state @ weight.T
        probs = teacher[depth : depth + chains].softmax(-1)
        losses = -(probs * logits.log_softmax(-1)).sum(-1)
        assert torch.allclose(said.losses_KC[depth], losses)
        assert torch.equal(said.draft_ids_KC[depth], logits.argmax(-1))
        total = total + (weights[depth] * losses).sum()
    (3 * total).backward()
    assert said.total.item() == pytest.approx(total.item(), rel=1e-12)
    for grad, leaf in zip(ours, (weight, *states), strict=True):
        assert torch.allclose(grad, leaf.grad, rtol=1e-10, atol=1e-12)


def test_a_step_leaves_nothing_for_the_garbage_collector():
    """On a GPU that would be gigabytes, held until a collection happens to come."""
    draft, head = make_draft(make_config()), make_head()
    batch = pack([make_sample("0011111", seed=1)])
    model, sup = Eagle3Model(draft, 3), supervise(batch, head, 3, "token")
    gc.collect()
    gc.disable()
    try:
        loss, _ = model(batch, head, sup, torch.ones(3))
        loss.backward()
        del loss
        assert not [x for x in gc.get_objects() if type(x) in (Shared, SharedMLP)]
    finally:
        gc.enable()
