"""Losses and their gradients by hand values, and against autograd in float64."""

import math

import pytest
import torch

from torchspec_lib.config.training import TrainingConfig
from torchspec_lib.models.head_loss import head_loss
from torchspec_lib.models.losses import gradient, mix

NAMES = ("kl", "tv", "lk_alpha", "lk_hybrid")


def figures(q, p):
    """Cross entropy and overlap of each row."""
    return -(p * q.log()).sum(-1), torch.minimum(p, q).sum(-1)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        ({"kl": 1.0}, -0.5 * math.log(0.25) - 0.5 * math.log(0.7)),
        ({"tv": 1.0}, 0.25),
        ({"lk_alpha": 1.0}, -math.log(0.75)),
        (
            {"lk_hybrid": 1.0},
            math.exp(-2.25) * (-0.5 * math.log(0.25) - 0.5 * math.log(0.7))
            + (1 - math.exp(-2.25)) * 0.25,
        ),
        ({"kl": 0.5, "tv": 4.0}, 0.5 * (-0.5 * math.log(0.25) - 0.5 * math.log(0.7)) + 1.0),
    ],
)
def test_a_loss_has_the_value_that_one_gets_by_hand(loss, value):
    q, p = torch.tensor([[0.25, 0.05, 0.7]]).double(), torch.tensor([[0.5, 0.0, 0.5]]).double()
    assert mix(loss, *figures(q, p)).values_R.item() == pytest.approx(value, rel=1e-6)


def by_autograd(loss, logits, p):
    """Gradients of the same losses, written down as the papers have them."""
    logits = logits.clone().requires_grad_()
    q = logits.softmax(-1)
    cross_entropy, overlap = figures(q, p)
    share = torch.exp(-3.0 * overlap).detach()
    values = {
        "kl": cross_entropy,
        "tv": 0.5 * (p - q).abs().sum(-1),
        "lk_alpha": -overlap.log(),
        "lk_hybrid": share * cross_entropy + (1 - share) * 0.5 * (p - q).abs().sum(-1),
    }
    sum(weight * values[name].sum() for name, weight in loss.items()).backward()
    return logits.grad


@pytest.mark.parametrize("loss", [*({name: 2.0} for name in NAMES), {"kl": 0.3, "lk_alpha": 0.7}])
def test_gradients_are_those_of_autograd(loss):
    random = torch.Generator().manual_seed(3)
    logits, teacher = (3 * torch.randn(64, 37, generator=random).double() for _ in range(2))
    q, p = logits.softmax(-1), teacher.softmax(-1)
    ours = gradient(q, p, mix(loss, *figures(q, p)))
    torch.testing.assert_close(ours, by_autograd(loss, logits, p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [{"lk_hybrid": 1.0}, {"kl": 0.5, "tv": 2.0}])
def test_the_heads_loss_takes_the_weighted_sum_at_every_depth(loss):
    random = torch.Generator().manual_seed(5)
    states = [torch.randn(6, 4, generator=random).double().requires_grad_() for _ in range(3)]
    head = torch.randn(11, 4, generator=random).double().requires_grad_()
    teacher = torch.randn(8, 11, generator=random).double()
    weights = torch.rand(3, 6, generator=random).double()
    head_loss(states, head, teacher, weights, loss).total.backward()
    for depth, state in enumerate(states):
        logits, p = state.detach() @ head.detach().T, teacher[depth : depth + 6].softmax(-1)
        by_logits = by_autograd(loss, logits, p) * weights[depth, :, None]
        torch.testing.assert_close(state.grad, by_logits @ head.detach())


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_that_equals_the_target_has_no_gradient(name):
    p = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).double().softmax(-1)
    assert gradient(p, p, mix({name: 1.0}, *figures(p, p))).abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_that_never_overlaps_has_finite_gradients(name):
    q, p = torch.tensor([[1.0 - 1e-30, 1e-30]]), torch.tensor([[0.0, 1.0]])
    losses = mix({name: 1.0}, *figures(q, p))
    assert losses.values_R.isfinite().all()
    assert gradient(q, p, losses).isfinite().all()


@pytest.mark.parametrize("loss", [{}, {"kl": 0.0}, {"mse": 1.0}])
def test_a_loss_without_weight_or_of_another_name_is_refused(loss):
    with pytest.raises(ValueError, match="loss"):
        TrainingConfig(loss=loss)
