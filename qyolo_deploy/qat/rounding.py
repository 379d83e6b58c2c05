"""Learned rounding: weights that oscillate late in training stop, and learn which integer they end at.

The last phase of stability-driven quantization-aware training.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.qat.oscillation import LOW_BITS, LayerSlice, OscillationTracker

STRETCH = 1.1
"""Of the tanh, so that an offset reaches -1 and 1 at a finite logit."""


def offset_of(logit: Tensor) -> Tensor:
    """`g(t) = clip(1.1 tanh t, -1, 1)`: steps from a weight's base integer, float32 of any shape."""
    return torch.clamp(STRETCH * torch.tanh(logit), -1, 1)


def penalty(offset: Tensor) -> Tensor:
    """`g^2 (1 - g^2)^2`: 0 at -1, 0 and 1, highest at 1 / sqrt(3), past which it leads to the outer integers."""
    square = offset.square()
    return square * (1 - square).square()


class LearnedRounding(OscillationTracker):
    """A tracker that gives oscillating weights of low-bit layers an offset to learn in place of their latent value.

    A caught weight is `base + g(t)` steps, cut to its grid: `base` is its mean integer, where freezing would leave it,
    and t starts where the weight is its latent value. So one that was pushed back and forth across a threshold is held
    between its levels, where the loss is a smooth function of it, and a growing penalty then drives it to the level
    that the loss prefers. At the end of this phase all become integers for good, to which the rest of training adapts.

    The logits are parameters from the start, though most learn late or never: so the order of parameters, and with it
    the optimizer's state in a checkpoint, is the same in every process and after every resume. Until a weight is
    caught its logit gets no gradient, or one of 0, and stays at 0 without moments.

    Like all counters of a tracker the logits are not averaged by the EMA: the average of a decision is an undecided
    weight, and the raw and the averaged state share their integers as they do those of freezing.

    Args:
        model: Calibrated.
        momentum: m of the running means.
    """

    caught: Tensor
    base: Tensor

    def __init__(self, model: PreparedModel, momentum: float) -> None:
        super().__init__(model, momentum)
        self.register_buffer("caught", torch.zeros_like(self.frozen))
        self.register_buffer("base", torch.zeros_like(self.frozen_integer))
        self._low = [layer for layer in self.layers if layer.bits <= LOW_BITS]
        self.logits = nn.ParameterList(nn.Parameter(torch.zeros_like(layer.conv.weight)) for layer in self._low)

    def _learning(self) -> Iterator[tuple[LayerSlice, nn.Parameter]]:
        """Layers with caught weights, and their logits."""
        for layer, logit in zip(self._low, self.logits, strict=True):
            if self.caught[layer.part].any():
                yield layer, logit

    def _levels(self, layer: LayerSlice, logit: Tensor) -> Tensor:
        """Levels of a layer's caught weights, in steps, of the weight's shape.

        Without gradients they are the integers that they would become now, so that a validation during training
        measures what would be exported.
        """
        assert layer.conv.quantizer is not None
        spec, offset = layer.conv.quantizer.spec, offset_of(logit)
        if not torch.is_grad_enabled():
            offset = offset.round()
        return torch.clamp(self.base[layer.part].view(logit.shape) + offset, spec.qmin, spec.qmax)

    @torch.no_grad()
    def current(self) -> Tensor:
        """Integers that the model computes with, those of learned offsets rounded."""
        integers = super().current()
        for layer, logit in self._learning():
            learned = self._levels(layer, logit).flatten().to(torch.int8)
            integers[layer.part] = torch.where(self.caught[layer.part], learned, integers[layer.part])
        return integers

    @torch.no_grad()
    def catch(self, threshold: float) -> None:
        """Lets weights of low-bit layers that oscillate more often than the threshold learn an offset from now on."""
        for layer, logit in zip(self._low, self.logits, strict=True):
            part, conv = layer.part, layer.conv
            caught = (self.frequency[part] > threshold) & ~self.caught[part]
            if not caught.any():
                continue
            base = self.mean[part].round()
            distance = (conv.weight / conv.weight_scale()).flatten() - base
            start = torch.atanh(torch.clamp(distance, -1, 1) / STRETCH)
            logit.copy_(torch.where(caught, start, logit.flatten()).view(logit.shape))
            self.base[part] = torch.where(caught, base.to(torch.int8), self.base[part])
            self.caught[part] |= caught
        self.attach()

    def regularize(self, weight: float) -> float:
        """Adds the gradient of the penalty to the logits.

        Args:
            weight: On the sum of the penalty over all caught weights.

        Returns:
            The loss.
        """
        total = 0.0
        for layer, logit in self._learning():
            mask = self.caught[layer.part].view(logit.shape)
            loss = weight * penalty(offset_of(logit))[mask].sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def settle(self) -> None:
        """Makes integers of all learned offsets, frozen for good."""
        if not self.caught.any():
            return
        self.frozen_integer.copy_(torch.where(self.caught, self.current(), self.frozen_integer))
        self.frozen |= self.caught
        self.caught.zero_()
        self.attach()

    def attach(self) -> None:
        """Lets the layers see what is frozen or learns, also in state that was just loaded."""
        super().attach()
        for layer, logit in self._learning():
            mask = self.caught[layer.part].view(logit.shape)
            layer.conv.frozen = (mask, partial(self._levels, layer, logit))

    def bake(self) -> None:
        """Writes settled and frozen integers into the latent weights; a run that ends early is settled first."""
        self.settle()
        super().bake()
