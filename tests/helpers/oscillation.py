"""A model of ten weights, and walks that make them oscillate."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from qyolo_deploy.graph.prepare import prepare
from qyolo_deploy.qat.oscillation import OscillationTracker
from qyolo_deploy.quant.spec import LayerScheme, QuantScheme, QuantSpec


class Core(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return (self.high(self.low(x)),)


def make_model(granularity="per_tensor", scale=0.1):
    """Two convolutions, of 6 weights in 4 bits and 4 weights in 8; channels have scales of their own."""
    torch.manual_seed(0)
    axis = 0 if granularity == "per_channel" else None
    weights = QuantSpec(4, granularity=granularity, axis=axis)
    scheme = QuantScheme(weights, QuantSpec(8, signed=False), first_last_bits=4, overrides={"high": LayerScheme(8, 8)})
    model = prepare(SimpleNamespace(core=Core().eval(), spec=SimpleNamespace(to_json=dict)), scheme)
    with torch.no_grad():
        for conv in model.convs().values():
            steps = torch.arange(1.0, 3.0) if axis == 0 else torch.ones(())
            conv.quantizer.scale.copy_(scale * steps)
    return model


def set_latent(model, levels):
    """Gives all weights places on their grids, in steps."""
    levels, start = torch.tensor(np.asarray(levels, np.float32)), 0
    with torch.no_grad():
        for conv in model.convs().values():
            part = levels[start : start + conv.weight.numel()].view(conv.weight.shape)
            conv.weight.copy_(part * conv.weight_scale())
            start += conv.weight.numel()


def follow(model, walk, momentum, kind=OscillationTracker):
    """A tracker that has seen every row of a walk; the first is where it starts."""
    set_latent(model, walk[0])
    tracker = kind(model, momentum)
    for row in walk[1:]:
        set_latent(model, row)
        tracker.update()
    return tracker


def flipping():
    """A walk in which the weights 0 and 1, and all in 8 bits, flip between 2 and 3, being 3 most of the time."""
    row, other = [2.0] * 2 + [-1.0] * 4 + [2.0] * 4, [3.0] * 2 + [-1.0] * 4 + [3.0] * 4
    return [row, other, other, other] * 6 + [row]
