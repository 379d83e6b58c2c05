"""LSQ and LSQ+ against the papers' equations (Esser 2020, eq. 1-3 and 5; Bhalgat 2020, eq. 1 and 4-6) in float64."""

import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from qyolo_deploy.graph import fake_quantize as module
from qyolo_deploy.graph.fake_quantize import MIN_SCALE, Quantizer, fake_quantize, zero_point_of
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantSpec

SPECS = [QuantSpec(2), QuantSpec(4), QuantSpec(8), QuantSpec(4, signed=False), QuantSpec(8, signed=False)]
CHANNELS = 5


def per_channel(spec):
    return QuantSpec(spec.bits, spec.signed, granularity="per_channel", axis=0)


def make_case(spec, channels, seed=0):
    """x, scale, offset and an incoming gradient; offsets lie on the grid, so that the papers' integer is ours.

    No value lies in the half step beyond the outermost levels: see the test on that.
    """
    rng = np.random.default_rng(seed)
    shape = (channels,) if channels else ()
    scale = rng.uniform(0.02, 0.3, shape).astype(np.float32)
    zero_point = np.zeros(shape) if spec.signed else rng.integers(0, spec.qmax // 2 + 1, shape)
    offset = (-zero_point * scale).astype(np.float32)
    levels = rng.uniform(spec.qmin - 4, spec.qmax + 4, (channels or 1, 4, 3, 3))
    for end, side in ((spec.qmin, -1), (spec.qmax, 1)):
        beyond = (levels - end) * side
        levels = np.where((beyond > 0) & (beyond < 0.6), end + side, levels)
    fraction = np.abs(levels - np.floor(levels) - 0.5)
    levels = np.where(fraction < 0.01, levels + 0.1, levels)
    wide = (slice(None), None, None, None) if channels else ()
    x = (levels * scale[wide] + offset[wide]).astype(np.float32)
    return x, scale, offset, rng.normal(size=x.shape).astype(np.float32)


def run(x, scale, offset, grad, spec):
    tensors = [torch.tensor(value, requires_grad=True) for value in (x, scale, offset)]
    out = fake_quantize(*tensors, spec)
    out.backward(torch.tensor(grad))
    return out.detach().numpy(), *(tensor.grad.numpy() for tensor in tensors)


def widen(value, x):
    return value.astype(np.float64).reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else np.float64(value)


def paper(x, scale, offset, spec):
    """`v = (x - offset) / s`; value and the three partial derivatives of every element."""
    s, b = widen(scale, x), widen(offset, x)
    v = (x.astype(np.float64) - b) / s
    below, above = v <= spec.qmin, v >= spec.qmax
    value = np.rint(np.clip(v, spec.qmin, spec.qmax)) * s + b
    inside = ~(below | above)
    to_scale = np.where(below, spec.qmin, np.where(above, spec.qmax, np.rint(v) - v))
    return value, inside.astype(float), to_scale, (~inside).astype(float)


def total(values, scale):
    return values.sum(tuple(range(1, values.ndim))) if scale.ndim else values.sum()


@pytest.mark.parametrize("channels", [0, CHANNELS], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_and_gradients_are_those_of_the_papers(spec, channels):
    x, scale, offset, grad = make_case(spec, channels)
    grid = per_channel(spec) if channels else spec
    out, to_x, to_scale, to_offset = run(x, scale, offset, grad, grid)
    value, d_x, d_scale, d_offset = paper(x, scale, offset, spec)
    np.testing.assert_allclose(out, value, rtol=1e-6, atol=1e-5 * scale.max())
    np.testing.assert_array_equal(to_x, (grad * d_x).astype(np.float32))
    np.testing.assert_allclose(to_scale, total(grad * d_scale, scale), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(to_offset, total(grad * d_offset, scale), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_slopes_of_the_straight_through_surrogate(spec):
    """With the rounding error held fixed, `s clip(v + error, qmin, qmax) + offset` is smooth where nobody clips."""
    x, scale, offset, grad = make_case(spec, 0, seed=3)
    _, to_x, to_scale, to_offset = run(x, scale, offset, grad, spec)
    v = (x.astype(np.float64) - offset) / scale
    error = np.rint(v) - v

    def surrogate(x, scale, offset):
        return (grad * (scale * np.clip((x - offset) / scale + error, spec.qmin, spec.qmax) + offset)).sum()

    x, scale, offset, step = x.astype(np.float64), float(scale), float(offset), 1e-7
    slope = (surrogate(x, scale + step, offset) - surrogate(x, scale - step, offset)) / (2 * step)
    # The outermost levels are clipped in the surrogate's one direction only: leave them to the test above.
    edge = (np.rint(v) == spec.qmin) | (np.rint(v) == spec.qmax)
    edge_part = np.where(edge, grad * (error - _central(surrogate_of(grad, error, spec), x, scale, offset, step)), 0)
    assert to_scale == pytest.approx(slope + edge_part.sum(), rel=1e-4, abs=1e-3)
    slope = (surrogate(x, scale, offset + step) - surrogate(x, scale, offset - step)) / (2 * step)
    assert to_offset == pytest.approx(slope, rel=1e-4, abs=1e-2)


def surrogate_of(grad, error, spec):
    return lambda x, scale, offset: scale * np.clip((x - offset) / scale + error, spec.qmin, spec.qmax) + offset


def _central(function, x, scale, offset, step):
    return (function(x, scale + step, offset) - function(x, scale - step, offset)) / (2 * step)
