"""SiLU and its three quantizers in one call, against the same three one after another."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qyolo_deploy.graph import fake_quantize as plain_module
from qyolo_deploy.graph import fused_silu as fused_module
from qyolo_deploy.graph import prepare as prepare_module
from qyolo_deploy.graph.fake_quantize import GradientRules, Quantizer
from qyolo_deploy.graph.fused_silu import FusedSilu
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

RANGES = ((-3.0, 5.0), (0.0, 0.9), (-0.2, 4.0))  # narrower than what comes, at both ends
SPECS = [QuantSpec(bits, signed=signed) for bits in (4, 8) for signed in (False, True)]


def make_quantizers(spec, rules=GradientRules()):  # noqa: B008 - frozen
    quantizers = []
    for low, high in RANGES:
        quantizer = Quantizer(spec)
        with torch.no_grad():
            quantizer.scale.fill_((high if spec.signed else high - low) / spec.qmax * 1.01)
            quantizer.offset.fill_(0.0 if spec.signed else low)
        quantizer.rules = rules
        quantizers.append(quantizer)
    return quantizers


def one_after_another(quantizers, x):
    before = quantizers[0](x)
    return quantizers[2](before * quantizers[1](torch.sigmoid(before)))


def run(function, quantizers, shape=(2, 3, 20, 30)):
    """Output and gradients to the input, the scales and the offsets."""
    quantizers = copy.deepcopy(quantizers)
    for quantizer in quantizers:
        quantizer.offset.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 4).requires_grad_()
    output = function(quantizers, x)
    output.backward(torch.randn(shape, generator=generator))
    parameters = [tensor for quantizer in quantizers for tensor in (quantizer.scale, quantizer.offset)]
    return output.detach(), x.grad, torch.stack([parameter.grad for parameter in parameters])


def assert_same(quantizers):
    fused, plain = (run(f, quantizers) for f in (lambda q, x: FusedSilu(q)(x), one_after_another))
    assert torch.equal(fused[0], plain[0])
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-5, atol=1e-6)
    size = plain[2].abs().max()
    torch.testing.assert_close(fused[2] / size, plain[2] / size, rtol=1e-4, atol=1e-5)
    return fused


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
def test_output_and_all_gradients_are_the_same(spec, eager, monkeypatch):
    if eager:
        for module in (fused_module, plain_module):
            monkeypatch.setattr(module, "kernel", lambda function: function)
    output, to_x, to_parameters = assert_same(make_quantizers(spec))
    assert 0.02 < (to_x == 0).float().mean() < 0.6  # what lies beyond the ends
    assert len(output.unique()) > 5 and (to_parameters != 0).all()


@pytest.mark.parametrize(
    "rules", [GradientRules(lsq_scale=True), GradientRules(margin=0.2), GradientRules(True, 0.1)], ids=str
)
def test_rules_hold(rules):
    spec = QuantSpec(4, signed=False)
    changed = assert_same(make_quantizers(spec, rules))
    assert not torch.allclose(changed[2], run(one_after_another, make_quantizers(spec))[2], rtol=0.01)


def test_each_quantizer_has_its_own_grid_and_rules():
    quantizers = [make_quantizers(spec)[index] for index, spec in enumerate((SPECS[2], SPECS[0], SPECS[1]))]
    quantizers[1].rules = GradientRules(lsq_scale=True)
    quantizers[2].rules = GradientRules(margin=0.3)
    assert_same(quantizers)


@pytest.mark.parametrize("off", [0, 1, 2])
def test_a_switched_off_quantizer_is_left_out(off):
    quantizers = make_quantizers(QuantSpec(4, signed=False))
    everything = FusedSilu(quantizers)(torch.linspace(-4, 6, 101))
    quantizers[off].enabled = False
    x = torch.linspace(-4, 6, 101)
    q0, q1, q2 = ((lambda value: value) if index == off else q for index, q in enumerate(quantizers))
    expected = q2(q0(x) * q1(torch.sigmoid(q0(x))))
    assert torch.equal(FusedSilu(quantizers)(x), expected)
    assert not torch.equal(expected, everything)


def test_half_precision_comes_out_in_float32():
    fused, x = FusedSilu(make_quantizers(QuantSpec(8, signed=False))), torch.randn(1, 2, 3, 4)
    assert fused(x.bfloat16()).dtype == torch.float32
    assert torch.equal(fused(x.bfloat16()), fused(x.bfloat16().float()))


def calls(model, kind):
    modules = dict(model.graph.named_modules())
    return [node for node in model.graph.graph.nodes if isinstance(modules.get(str(node.target)), kind)]


def test_every_silu_of_a_network_is_fused_and_nothing_else_changes(pico, make_prepared, images, monkeypatch):
    fused = make_prepared(pico)
    monkeypatch.setattr(prepare_module, "fuse_silu", lambda graph: None)
    plain = make_prepared(pico)
    assert len(calls(fused, FusedSilu)) == len(calls(plain, nn.Sigmoid)) == 53
    assert not calls(fused, nn.Sigmoid) and not calls(plain, FusedSilu)
    assert len(calls(plain, Quantizer)) - len(calls(fused, Quantizer)) == 3 * 53
    fused.load_state_dict(plain.state_dict())
    for left, right in zip(fused.features(images), plain.features(images), strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(left, right, strict=True))
    assert list(fused.quantizers()) == list(plain.quantizers())


def test_a_network_learns_by_the_same_gradients(small_network, make_prepared, images, monkeypatch):
    gradients = []
    for fuse in (prepare_module.fuse_silu, lambda graph: None):
        monkeypatch.setattr(prepare_module, "fuse_silu", fuse)
        model = make_prepared(small_network())
        sum(raw.square().sum() for raw in model(images)).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    for name, value in gradients[1].items():
        size = value.abs().max() + 1e-3
        torch.testing.assert_close(gradients[0][name] / size, value / size, rtol=1e-3, atol=1e-3)


def test_what_others_read_is_not_fused(images, make_prepared):
    """The value before SiLU, where a sum reads it too."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.SiLU()

        def forward(self, x):
            before = self.a(x)
            return (self.b(self.act(before) + before),)

    detector = SimpleNamespace(core=Network().eval(), spec=None)
    model = make_prepared(detector, QuantScheme(QuantSpec(8), QuantSpec(8, signed=False)))
    assert not calls(model, FusedSilu) and len(calls(model, nn.Sigmoid)) == 1
    assert torch.isfinite(model(images)[0]).all()
