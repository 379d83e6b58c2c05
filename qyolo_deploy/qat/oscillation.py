"""Oscillating weights: how often each one flips, dampening them, and freezing those that flip too often.

Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training".
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qyolo_deploy.graph.fake_quantize import kernel
from qyolo_deploy.graph.layers import QuantConv
from qyolo_deploy.graph.prepare import PreparedModel

OSCILLATING = 0.005
"""Frequency above which a weight counts as oscillating (section 2.2)."""
LOW_BITS = 4
"""Layers of more bits are left alone: their steps are too fine to matter."""


@dataclass(frozen=True)
class LayerSlice:
    """Where a layer's weights lie in the tracker's flat buffers."""

    name: str
    conv: QuantConv
    start: int
    end: int

    @property
    def bits(self) -> int:
        """Of the weights' grid."""
        return bits_of(self.conv)

    @property
    def part(self) -> slice:
        """The layer's place in flat buffers."""
        return slice(self.start, self.end)


def _track(
    new: Tensor, old: Tensor, direction: Tensor, frequency: Tensor, mean: Tensor, momentum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of section 2.2: `f <- m o + (1 - m) f`, where o tells a change against the last change's direction."""
    change = torch.sign(new.to(torch.int16) - old.to(torch.int16)).to(torch.int8)
    oscillated = (change * direction) < 0
    frequency = frequency + momentum * (oscillated.float() - frequency)
    mean = mean + momentum * (new.float() - mean)
    return torch.where(change != 0, change, direction), frequency, mean


class OscillationTracker(nn.Module):
    """Counts sign changes of the integers of all quantized weights; all of its state is in buffers.

    Args:
        model: Calibrated.
        momentum: m of the running means.
    """

    integer: Tensor
    direction: Tensor
    frequency: Tensor
    mean: Tensor
    frozen: Tensor
    frozen_integer: Tensor
    _momentum: Tensor

    def __init__(self, model: PreparedModel, momentum: float) -> None:
        super().__init__()
        self.layers = tuple(_slices(model))
        self.register_buffer("_momentum", torch.tensor(momentum), persistent=False)
        count = self.layers[-1].end if self.layers else 0
        integer = self._integers()
        self.register_buffer("integer", integer)
        self.register_buffer("direction", torch.zeros(count, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros(count))
        self.register_buffer("mean", integer.float())
        self.register_buffer("frozen", torch.zeros(count, dtype=torch.bool))
        self.register_buffer("frozen_integer", torch.zeros(count, dtype=torch.int8))

    @torch.no_grad()
    def _integers(self) -> Tensor:
        return torch.cat([_integers_of(layer.conv).flatten() for layer in self.layers] or [torch.zeros(0).char()])

    def current(self) -> Tensor:
        """Integers that the model computes with, int8, flat."""
        return torch.where(self.frozen, self.frozen_integer, self._integers())

    @torch.no_grad()
    def update(self) -> None:
        """Looks at the weights after an optimizer step."""
        new = self.current()
        state = kernel(_track)(new, self.integer, self.direction, self.frequency, self.mean, self._momentum)
        for buffer, value in zip((self.direction, self.frequency, self.mean), state, strict=True):
            buffer.copy_(value)
        self.integer.copy_(new)

    @torch.no_grad()
    def freeze(self, threshold: float) -> None:
        """Fixes weights of low-bit layers that flip more often than the threshold, at their mean integer, for good."""
        for layer in self.layers:
            if layer.bits > LOW_BITS:
                continue
            part = layer.part
            caught = (self.frequency[part] > threshold) & ~self.frozen[part]
            self.frozen_integer[part] = torch.where(
                caught, self.mean[part].round().to(torch.int8), self.frozen_integer[part]
            )
            self.frozen[part] |= caught
        self.attach()

    def attach(self) -> None:
        """Lets the layers see what is frozen, also in buffers that were just loaded."""
        if not self.frozen.any():
            return
        for layer in self.layers:
            part, shape = layer.part, layer.conv.weight.shape
            layer.conv.frozen = (self.frozen[part].view(shape), fixed(self.frozen_integer[part].view(shape)))

    @torch.no_grad()
    def bake(self) -> None:
        """Writes frozen integers into the latent weights, after which the model needs no tracker any more."""
        for layer in self.layers:
            part, conv = layer.part, layer.conv
            mask = self.frozen[part].view(conv.weight.shape)
            values = self.frozen_integer[part].view(conv.weight.shape) * conv.weight_scale()
            conv.weight.copy_(torch.where(mask, values, conv.weight))
            conv.frozen = None

    def shares(self) -> dict[str, dict[str, float]]:
        """For each layer the shares of oscillating and of frozen weights."""
        found = {}
        for layer in self.layers:
            part = layer.part
            found[layer.name] = {
                "bits": layer.bits,
                "weights": layer.end - layer.start,
                "oscillating": (self.frequency[part] > OSCILLATING).float().mean().item(),
                "frozen": self.frozen[part].float().mean().item(),
            }
        return found


def _slices(model: PreparedModel) -> Iterator[LayerSlice]:
    start = 0
    for name, conv in model.convs().items():
        if conv.quantizer is not None:
            yield LayerSlice(name, conv, start, start + conv.weight.numel())
            start += conv.weight.numel()


def bits_of(conv: QuantConv) -> int:
    """Bits of a quantized layer's weights."""
    assert conv.quantizer is not None
    return conv.quantizer.spec.bits


def fixed(levels: Tensor) -> Callable[[], Tensor]:
    """Levels that do not change, as `QuantConv.frozen` wants them."""
    return lambda: levels


def _integers_of(conv: QuantConv) -> Tensor:
    """Integers of the latent weights, int8 of the weight's shape."""
    assert conv.quantizer is not None
    spec = conv.quantizer.spec
    return (conv.weight / conv.weight_scale()).round_().clamp_(spec.qmin, spec.qmax).to(torch.int8)


@torch.no_grad()
def dampen(model: PreparedModel, weight: float) -> float:
    """Adds the gradient of the dampening loss to the latent weights of low-bit layers.

    `L = weight * sum || sg(q(w)) - clip(w, s qmin, s qmax) ||^2` (section 4.2): its gradient
    `2 weight (clip(w) - q(w))` needs no graph, and scales get none.

    Args:
        model: After the backward pass.
        weight: lambda, on the sum over all weights.

    Returns:
        The loss.
    """
    total = 0.0
    for conv in model.convs().values():
        if conv.quantizer is None or bits_of(conv) > LOW_BITS or conv.weight.grad is None:
            continue
        spec, scale = conv.quantizer.spec, conv.weight_scale()
        error = torch.clamp(conv.weight, spec.qmin * scale, spec.qmax * scale) - _integers_of(conv) * scale
        if conv.frozen is not None:
            error = error.masked_fill(conv.frozen[0], 0.0)
        conv.weight.grad.add_(error, alpha=2 * weight)
        total += weight * float(error.square().sum())
    return total


def rising(progress: float, highest: float, start: float, end: float = 1.0) -> float:
    """Half a cosine from 0 at `start` to `highest` at `end`, shares of training; 0 before, `highest` after."""
    share = min(1.0, max(0.0, (progress - start) / (end - start)))
    return highest * (1 - math.cos(math.pi * share)) / 2


def falling(progress: float, first: float, last: float, start: float) -> float | None:
    """Half a cosine from `first` at `start` to `last` at the end of training; None before."""
    if progress < start:
        return None
    return last + (first - last) * (1 + math.cos(math.pi * (progress - start) / (1 - start))) / 2
