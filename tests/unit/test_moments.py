"""Matching moments: afterwards every channel has the mean and the spread that it has in the float network."""

import numpy as np
import pytest
import torch
from helpers.layers import assert_integers_compute_the_layers
from torch import nn

from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.layers import QuantConv
from qyolo_deploy.graph.moments import match_moments
from qyolo_deploy.graph.simulate import simulate
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

NORMS = {"stem.0": "stem.1", "a.0": "a.1", "c.0": "c.1", "b.0": "b.1"}  # the heads have none


def outputs_of(network, modules, images):
    """What modules compute, float64, by name."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.double().numpy()}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return seen


def float_outputs(detector, names, images):
    """Behind batch normalisation where there is one."""
    return outputs_of(
        detector.core, {name: detector.core.get_submodule(NORMS.get(name, name)) for name in names}, images
    )


def moments(values):
    return values.mean((0, 2, 3)), values.std((0, 2, 3))


@pytest.fixture
def pair(small_network, make_prepared, images):
    """The small network, and it in 4 bits with ranges that clip what is largest."""
    detector = small_network()
    detector.decode = nn.Identity()
    model = make_prepared(detector, QuantScheme(QuantSpec(4), QuantSpec(4, signed=False), first_last_bits=4))
    with torch.no_grad():
        for quantizer in model.quantizers().values():
            quantizer.scale.mul_(0.9)
            quantizer.offset.mul_(0.9)
    for conv in model.convs().values():
        conv.source = ()  # means cannot be met more finely than biases are rounded
    return detector, model


def test_every_channel_has_the_float_network_s_moments(pair, images):
    detector, model = pair
    wanted = float_outputs(detector, model.convs(), images)
    before = outputs_of(model, model.convs(), images)
    match_moments(model, detector, images)
    after = outputs_of(model, model.convs(), images)
    assert len(wanted) == 6
    for name, values in wanted.items():
        mean, spread = moments(values)
        off = [
            [
                np.abs(found - expected) / spread
                for found, expected in zip(moments(seen[name]), (mean, spread), strict=True)
            ]
            for seen in (before, after)
        ]
        assert max(part.max() for part in off[1]) < 2e-3, name
        assert max(part.max() for part in off[0]) > 0.03, name  # there was something to correct


def test_a_channel_that_hardly_varies_gets_its_mean_and_keeps_a_finite_gain(pair, images):
    detector, model = pair
    with torch.no_grad():
        model.convs()["a.0"].weight[0] = 0.0
        model.convs()["head_1"].weight[2] = 0.0
    match_moments(model, detector, images)
    wanted, found = float_outputs(detector, model.convs(), images), outputs_of(model, model.convs(), images)
    for name, channel in (("a.0", 0), ("head_1", 2)):
        assert found[name][:, channel].std() < 1e-6
        assert found[name][:, channel].mean() == pytest.approx(wanted[name][:, channel].mean(), abs=1e-4)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert model.convs()["head_1"].log_gain.abs().max() <= np.log(2) + 1e-6


def test_the_integers_compute_what_was_matched(pico, make_prepared, images):
    model = make_prepared(pico)
    untouched = freeze(model, {})
    match_moments(model, pico, images)
    quantized = freeze(model, {})
    assert_integers_compute_the_layers(model, quantized, simulate(pico, quantized), images)
    for name, layer in quantized.layers.items():  # scales and biases alone were corrected
        np.testing.assert_array_equal(layer.weight, untouched.layers[name].weight)
        assert (layer.qparams.scale != untouched.layers[name].qparams.scale).any()


def test_the_float_network_is_left_as_it_is(pair, images):
    detector, model = pair
    before = {name: value.clone() for name, value in detector.core.state_dict().items()}
    match_moments(model, detector, images)
    assert all(torch.equal(value, before[name]) for name, value in detector.core.state_dict().items())
    assert not [name for name, module in detector.core.named_modules() if module._forward_hooks]
    assert not [name for name, module in model.named_modules() if module._forward_hooks]


@pytest.mark.parametrize("normalised", [False, True])
def test_rescaling_is_exact(normalised):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5) if normalised else None
    if normalised:
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()
    conv = QuantConv(nn.Conv2d(3, 5, 3), norm, None).double()
    with torch.no_grad():
        conv.log_gain.normal_(0, 0.2)
        conv.shift.normal_()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = conv(x)
        for _ in range(2):
            gain, shift = torch.rand(5, dtype=torch.float64) * 1.5 + 0.5, torch.randn(5, dtype=torch.float64)
            conv.rescale_(gain, shift)
            expected = expected * gain[:, None, None] + shift[:, None, None]
            torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
