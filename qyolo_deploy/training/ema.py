"""Exponential moving average of everything that is learned: weights, scales, offsets, batch normalisation."""

import math

import torch
from torch import Tensor, nn

COUNTERS = "tracker."
"""Modules of this name keep counts and running means of their own, which are not averaged again."""


class Ema:
    """`shadow <- a shadow + (1 - a) value` after each step (Gupta and Asthana, 2311.05109, section 3).

    The decay rises as `a (1 - exp(-n / warmup))`, so that early, fast changes are not held back.

    Args:
        model: The model that learns.
        decay: Final a.
        warmup: Steps after which the decay has reached 63 %.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: float) -> None:
        self._model = model
        self._decay, self._warmup = decay, warmup
        self.steps = 0
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the shadow one step towards the model."""
        self.steps += 1
        decay = self._decay * (1 - math.exp(-self.steps / self._warmup))
        shadows: list[Tensor] = []
        values: list[Tensor] = []
        for name, value in self._model.state_dict().items():
            if value.is_floating_point() and not name.startswith(COUNTERS):
                shadows.append(self.shadow[name])
                values.append(value)
            else:
                self.shadow[name].copy_(value)
        torch._foreach_lerp_(shadows, values, 1 - decay)
