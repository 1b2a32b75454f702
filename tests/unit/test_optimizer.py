import pytest
import torch

from torchspec_lib.config.training import TrainingConfig
from torchspec_lib.training.optimizer import (
    build_optimizer,
    build_scheduler,
    learning_rate_factor,
)


def _factors(num_steps, **settings):
    training = TrainingConfig(learning_rate=1e-3, **settings)
    return [learning_rate_factor(i, training, num_steps) for i in range(num_steps + 1)]


def test_the_rate_rises_evenly_over_the_warm_up_and_no_step_has_none():
    assert _factors(20, warmup_ratio=0.2)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)]
)
def test_the_rate_falls_to_its_floor_after_the_last_step(schedule, middle):
    factors = _factors(8, warmup_ratio=0.0, lr_schedule=schedule, min_learning_rate=1e-4)
    assert factors[0] == 1.0
    assert factors[4] == pytest.approx(middle)
    assert factors[8] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert factors == sorted(factors, reverse=True)


def test_a_cosine_is_flat_at_both_ends_and_a_line_is_not():
    cosine, line = (_factors(8, warmup_ratio=0.0, lr_schedule=s) for s in ("cosine", "linear"))
    assert cosine[1] > line[1]
    assert cosine[7] < line[7]


def test_wsd_warms_up_stays_and_falls_in_a_line_over_its_share_of_the_steps():
    settings = {"lr_schedule": "wsd", "warmup_ratio": 0.2, "decay_ratio": 0.4}
    factors = _factors(10, min_learning_rate=2e-4, **settings)
    assert factors == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_schedule": "wsd", "warmup_ratio": 0.7, "decay_ratio": 0.4}, "must not exceed"),
        ({"lr_schedule": "cosine", "decay_ratio": 0.4}, "does nothing with 'cosine'"),
    ],
)
def test_a_decay_that_does_not_fit_or_has_no_effect_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_steps_beyond_the_plan_stay_at_the_floor():
    training = TrainingConfig(learning_rate=1e-3, min_learning_rate=1e-4)
    assert learning_rate_factor(500, training, 100) == pytest.approx(0.1)


def test_a_run_of_one_step_trains_at_the_full_rate():
    assert _factors(1)[0] == 1.0


def test_the_scheduler_drives_the_optimizer_with_the_configured_settings():
    model = torch.nn.LayerNorm(2, bias=False)
    training = TrainingConfig(
        optimizer="adamw",
        learning_rate=1e-3,
        betas=(0.8, 0.9),
        weight_decay=0.1,
        warmup_ratio=0.5,
    )
    optimizer = build_optimizer(model, training)
    scheduler = build_scheduler(optimizer, training, num_steps=6)
    [group] = optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.9), 0.1)
    rates = []
    for _ in range(6):
        rates.append(group["lr"])
        model.weight.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-3 * learning_rate_factor(i, training, 6) for i in range(6)])
