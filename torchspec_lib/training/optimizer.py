"""AdamW, and how its learning rate runs over a training."""

import math
from collections.abc import Iterable

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from torchspec_lib.config.training import TrainingConfig


def build_optimizer(parameters: Iterable[torch.nn.Parameter], training: TrainingConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) over all of ``parameters``, in one kernel on a GPU."""
    trained = list(parameters)
    return AdamW(
        trained,
        lr=training.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        fused=all(parameter.is_cuda for parameter in trained),
    )


def build_scheduler(optimizer: AdamW, training: TrainingConfig, num_steps: int) -> LambdaLR:
    """The schedule over ``num_steps`` steps; call its ``step`` after each optimizer step."""
    return LambdaLR(optimizer, lambda index: learning_rate_factor(index, training, num_steps))


def learning_rate_factor(index: int, training: TrainingConfig, num_steps: int) -> float:
    """Share of ``training.learning_rate`` that holds in a step.

    Rises in equal parts over the warm-up, none of them zero, so that no step is wasted; then
    stays, or falls to ``min_learning_rate`` in a line or half a cosine (Loshchilov & Hutter
    2017, equation 5), which it reaches one step after the last. ``wsd`` stays, and falls in a
    line over the last steps (Hu et al. 2024, arXiv 2404.06395, section 4.2).

    Args:
        index: The step, counted from 0.
        training: Schedule, warm-up and floor.
        num_steps: Steps of the whole run.

    Returns:
        A number in (0, 1], or 0 past the end where there is no floor.
    """
    num_warmup = round(training.warmup_ratio * num_steps)
    if index < num_warmup:
        return (index + 1) / (num_warmup + 1)
    if training.lr_schedule == "constant":
        return 1.0
    floor = training.min_learning_rate / training.learning_rate
    num_stable = 0
    if training.lr_schedule == "wsd":
        num_stable = num_steps - num_warmup - round(training.decay_ratio * num_steps)
    num_passed = max(0, index - num_warmup - num_stable)
    progress = min(1.0, num_passed / max(1, num_steps - num_warmup - num_stable))
    if training.lr_schedule in ("linear", "wsd"):
        return floor + (1.0 - floor) * (1.0 - progress)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
