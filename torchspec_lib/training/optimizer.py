"""The optimizers, and how their learning rate runs over a training."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchspec_lib.config.training import TrainingConfig
from torchspec_lib.training.muon import Muon


class MuonWithAdamW(Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer."""

    def __init__(self, matrices: list[Parameter], others: list[Parameter], **settings: Any) -> None:
        """``settings`` are AdamW's; Muon takes ``lr`` and ``weight_decay`` of them."""
        self._muon = Muon(matrices, settings["lr"], settings["weight_decay"])
        self._adamw = AdamW(others, **settings)
        super().__init__(self._muon.param_groups + self._adamw.param_groups, {})
        self._share()

    def _share(self) -> None:
        """Have both work on this optimizer's groups and state."""
        self._muon.param_groups, self._adamw.param_groups = (
            self.param_groups[:1],
            self.param_groups[1:],
        )
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        self._muon.step()
        self._adamw.step()


def build_optimizer(model: nn.Module, training: TrainingConfig) -> Optimizer:
    """The optimizer over all of a model's parameters that aren't frozen.

    AdamW (Loshchilov & Hutter 2019) runs in one kernel on a GPU.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": training.betas,
        "weight_decay": training.weight_decay,
        "fused": all(parameter.is_cuda for parameter in parameters.values()),
    }
    if training.optimizer == "adamw":
        return AdamW(parameters.values(), **settings)
    inner = {name for name, p in parameters.items() if p.ndim == 2 and "lm_head" not in name}
    matrices = [parameters[name] for name in parameters if name in inner]
    others = [parameters[name] for name in parameters if name not in inner]
    return MuonWithAdamW(matrices, others, **settings)


def build_scheduler(optimizer: Optimizer, training: TrainingConfig, num_steps: int) -> LambdaLR:
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
