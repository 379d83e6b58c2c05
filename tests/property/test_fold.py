"""Folding into integers is algebra: nothing may be lost but the rounding of biases and of float32 scales."""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from qyolo_deploy.graph.freeze import fold_affine, freeze
from qyolo_deploy.graph.layers import MIN_GAMMA, QuantConv
from qyolo_deploy.graph.prepare import prepare
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

GAMMAS = st.one_of(st.floats(0.01, 4), st.floats(-4, -0.01), st.sampled_from([0.0, 1e-7, -1e-7, 1e-4]))


class OneLayer(nn.Module):
    """A whole network of one convolution, with or without batch normalisation."""

    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x):
        h = self.conv(x)
        return (self.norm(h) if self.norm is not None else h,)


@st.composite
def layers(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    c_in, c_out = 4, draw(st.sampled_from([4, 8]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    conv = nn.Conv2d(c_in, c_out, draw(st.sampled_from([1, 3])), padding=1, groups=groups, bias=draw(st.booleans()))
    if draw(st.booleans()):
        return conv, None
    norm = nn.BatchNorm2d(c_out, eps=draw(st.sampled_from([1e-3, 1e-5])))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(draw(st.lists(GAMMAS, min_size=c_out, max_size=c_out))))
        norm.bias.normal_(0, 2)
        norm.running_mean.normal_(0, 3)
        norm.running_var.uniform_(0, draw(st.sampled_from([1e-4, 1.0, 50.0])))
    return conv, norm


def prepared_layer(conv, norm, bits, granularity, weight_scale, scale, zero_point):
    axis = 0 if granularity == "per_channel" else None
    weights = QuantSpec(bits, granularity=granularity, axis=axis)
    scheme = QuantScheme(weights, QuantSpec(8, signed=False), first_last_bits=bits)
    network = SimpleNamespace(core=OneLayer(conv, norm).eval(), spec=SimpleNamespace(to_json=dict))
    model = prepare(network, scheme)
    with torch.no_grad():
        rows = torch.arange(1, conv.out_channels + 1) if axis == 0 else torch.ones(())
        model.convs()["conv"].quantizer.scale.copy_(weight_scale * rows)
        model.quantizers()["images"].scale.fill_(scale)
        model.quantizers()["images"].offset.fill_(-scale * zero_point)
    return model


@settings(max_examples=120)
@given(
    layer=layers(),
    bits=st.sampled_from([2, 3, 4, 8]),
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
    weight_scale=st.floats(0.0078125, 0.125, width=32),
    scale=st.floats(2.0**-10, 0.125, width=32),
    zero_point=st.integers(0, 255),
    gain=st.floats(-1, 1),
    shift=st.floats(-1, 1),
)
def test_a_folded_layer_computes_what_the_layer_computed(
    layer, bits, granularity, weight_scale, scale, zero_point, gain, shift
):
    conv, norm = layer
    model = prepared_layer(conv, norm, bits, granularity, weight_scale, scale, zero_point)
    learned = model.convs()["conv"]
    channels = conv.out_channels
    with torch.no_grad():
        learned.log_gain.copy_(torch.linspace(-gain, gain, channels))
        learned.shift.copy_(torch.linspace(shift, -shift, channels))
    quantized = freeze(model, {})
    found, source = quantized.layers["conv"], quantized.activations["images"]

    codes = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 5)) - int(source.zero_point)
    x = torch.tensor(codes * float(source.scale))  # float64, on the grid

    # The layer as the definition has it, in float64, with the detector's own parameters.
    step = learned.quantizer.scale.detach().reshape(-1, 1, 1, 1)
    sign = torch.ones(channels) if norm is None else torch.where(norm.weight < 0, -1.0, 1.0)
    turned = conv.weight.detach() * sign[:, None, None, None]
    integers = torch.clamp(torch.round(turned / step), found.qparams.spec.qmin, found.qparams.spec.qmax)
    h = functional.conv2d(x, (integers * step).double(), padding=1, groups=conv.groups)
    g, s = torch.exp(learned.log_gain.detach().double()), learned.shift.detach().double()
    plain_bias = torch.zeros(channels) if conv.bias is None else conv.bias.detach()
    if norm is None:
        expected = per_channel(g) * (h + per_channel(plain_bias)) + per_channel(s)
    else:
        mean = (norm.running_mean - plain_bias).double() * sign
        gamma = norm.weight.detach().double().abs().clamp_min(1e-6)
        slope = gamma / torch.sqrt(norm.running_var.double() + norm.eps)
        expected = per_channel(slope) * (per_channel(g) * h + per_channel(s) - per_channel(mean))
        expected = expected + per_channel(norm.bias)

    # The integer layer: codes, integer weights and biases; one scale at the end.
    accumulators = functional.conv2d(
        torch.tensor(codes).double(), torch.tensor(found.weight).double(), padding=1, groups=conv.groups
    ) + per_channel(torch.tensor(found.bias))
    ours = accumulators * per_channel(torch.tensor(found.qparams.scale.astype(np.float64) * float(source.scale)))

    coarse = found.qparams.scale / np.maximum(scales_of(learned, norm, g), 1e-300) > 1.5
    assert accumulators.abs().max() < 2**31
    same = torch.tensor(found.weight) == integers
    assert same[torch.tensor(~coarse)].all()
    bias_step = torch.tensor(found.qparams.scale.astype(np.float64) * float(source.scale))
    # A coarse channel rounds its weights again: half a step for each of at most 36 products.
    weights_off = torch.tensor(coarse) * bias_step * 0.5 * np.abs(codes).max() * turned[0].numel()
    slack = 0.5001 * bias_step + weights_off
    tolerance = per_channel(slack) + 2e-6 * (expected.abs() + h.abs() * per_channel(torch.tensor(found.qparams.scale)))
    size = functional.conv2d(x.abs(), torch.tensor(np.abs(found.weight)).double(), padding=1, groups=conv.groups)
    tolerance = tolerance + 1e-6 * size * per_channel(torch.tensor(found.qparams.scale.astype(np.float64)))
    assert ((ours - expected).abs() <= tolerance).all()


@settings(max_examples=120)
@given(layer=layers(), gain=st.floats(-2, 2), shift=st.floats(-3, 3), seed=st.integers(0, 2**16))
def test_folding_is_exact_algebra(layer, gain, shift, seed):
    """In float64, before anything is rounded: gain, shift and normalisation in turn against one factor and one bias."""
    conv, norm = layer
    learned = QuantConv(conv, norm, QuantSpec(8)).requires_grad_(False)
    learned.log_gain.copy_(torch.linspace(-gain, gain, conv.out_channels))
    learned.shift.copy_(torch.linspace(shift, -shift, conv.out_channels))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 5, 5, generator=generator, dtype=torch.float64)
    sign = torch.ones(conv.out_channels) if norm is None else torch.where(norm.weight < 0, -1.0, 1.0)
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    h = per_channel(sign) * functional.conv2d(x, conv.weight.detach().double(), padding=1, groups=conv.groups)
    g, s = per_channel(torch.exp(learned.log_gain.double())), per_channel(learned.shift)
    if norm is None:
        terms = [g * h, g * per_channel(bias), s]
    else:
        gamma = per_channel(norm.weight.detach().abs().clamp_min(MIN_GAMMA))
        slope = gamma / torch.sqrt(per_channel(norm.running_var) + norm.eps)
        mean = per_channel((norm.running_mean - bias) * sign)
        terms = [slope * (g * h), slope * s, -slope * mean, per_channel(norm.bias.detach())]
    factor, constant = fold_affine(learned)
    weight = learned.weight.double() * torch.tensor(factor)[:, None, None, None]
    folded = functional.conv2d(x, weight, torch.tensor(constant), padding=1, groups=conv.groups)
    size = sum(term.abs() for term in terms) + functional.conv2d(x.abs(), weight.abs(), padding=1, groups=conv.groups)
    assert ((folded - sum(terms)).abs() <= 1e-12 * size).all()


def scales_of(learned, norm, gain):
    """Exact folded weight scales, float64 `[C_out]`."""
    step = learned.quantizer.scale.detach().double().expand(len(gain))
    if norm is None:
        return (step * gain).numpy()
    gamma = norm.weight.detach().double().abs().clamp_min(1e-6)
    return (step * gain * gamma / torch.sqrt(norm.running_var.double() + norm.eps)).numpy()


def per_channel(values):
    return values.double().reshape(-1, 1, 1)


@settings(max_examples=60)
@given(share=st.floats(0.01, 1.5), seed=st.integers(0, 2**16))
def test_a_channel_whose_bias_would_not_fit_gets_the_nearest_weights_of_a_coarser_grid(share, seed):
    """`share` is that of the folded scale in the smallest scale that leaves the bias room; below 1 it must give way."""
    torch.manual_seed(seed)
    conv, norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    scale, weight_scale = 0.125, 0.0625
    with torch.no_grad():
        norm.weight.fill_(1e-6)
        folded = weight_scale * 1e-6 / np.sqrt(1 + norm.eps)
        norm.bias.fill_(folded / share * scale * 2**30)
    model = prepared_layer(conv, norm, 8, "per_tensor", weight_scale, scale, 0)
    layer = freeze(model, {}).layers["conv"]
    integers = np.clip(np.rint(conv.weight.detach().numpy() / weight_scale), -128, 127)
    step = layer.qparams.scale.astype(np.float64)[:, None, None, None]
    assert np.abs(layer.weight * step - integers * folded).max() <= 0.5001 * step.max()
    assert (np.abs(layer.bias.astype(np.int64)) <= 2**30 + 1).all()
    np.testing.assert_allclose(
        layer.bias * layer.qparams.scale.astype(np.float64) * scale, norm.bias.detach(), rtol=1e-6
    )
