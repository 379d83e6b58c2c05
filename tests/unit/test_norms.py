"""Batch normalisation: by batches' statistics, estimated again, and how far apart two estimates are."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from qyolo_deploy.graph.layers import QuantConv
from qyolo_deploy.qat.norms import divergence, normalised, reestimate, use_batch_statistics
from qyolo_deploy.quant.spec import QuantSpec


def some_batches(count=3):
    """Batches whose statistics differ."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, 32, 32, generator=generator) ** (number + 1) for number in range(count)]


@pytest.fixture
def model(small_network, make_prepared, images):
    return make_prepared(small_network(), images=images)


def test_new_statistics_are_the_mean_of_the_batches(model):
    """Variances are those of a sample, as torch's running ones are."""
    outputs = {name: [] for name in normalised(model)}
    for name, conv in normalised(model).items():

        def keep(conv, inputs, _, name=name):
            outputs[name].append(conv.convolve(inputs[0], conv.quantized_weight()).double().numpy())

        conv.register_forward_hook(keep)
    assert list(outputs) == ["stem.0", "a.0", "c.0", "b.0"]  # not the heads
    reestimate(model, some_batches())
    for name, conv in normalised(model).items():
        means = [batch.mean((0, 2, 3)) for batch in outputs[name]]
        variances = [batch.var((0, 2, 3), ddof=1) for batch in outputs[name]]
        assert len(means) == 3
        np.testing.assert_allclose(conv.mean, np.mean(means, 0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(conv.var, np.mean(variances, 0), rtol=1e-4)


def test_it_changes_statistics_alone_and_tells_their_divergence(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = reestimate(model, some_batches())
    for name, value in model.state_dict().items():
        moved = name.endswith((".mean", ".var")) and "head" not in name
        assert torch.equal(value, before[name]) != moved, name
    for name, conv in normalised(model).items():
        old = before[f"graph.{name}.mean"], before[f"graph.{name}.var"]
        assert told[name] == pytest.approx(divergence(*old, conv.mean, conv.var).mean().item()) and told[name] > 0
    first, second = model(images), model(images)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))  # statistics rest again


def test_the_mode_ends_with_it_also_after_an_error(model, images):
    def broken():
        yield images
        raise OSError("unreadable")

    reestimate(model, some_batches())
    assert all(conv.norm_momentum is None for conv in normalised(model).values())
    with pytest.raises(OSError, match="unreadable"):
        reestimate(model, broken())
    assert all(conv.norm_momentum is None for conv in normalised(model).values())


def test_no_batches_change_nothing(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(reestimate(model, []).values()) == {0.0}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_divergence_is_that_of_two_normal_distributions():
    """By numerical integration of `p log(p / q)`."""
    mean, var = np.array([0.0, 1.5, -2.0, 0.3]), np.array([1.0, 0.2, 3.0, 0.5])
    true_mean, true_var = np.array([0.0, 0.5, 1.0, 0.3]), np.array([2.0, 0.3, 0.8, 0.5])
    x = np.linspace(-40, 40, 400_001)[:, None]

    def log_density(mean, var):
        return -((x - mean) ** 2) / (2 * var) - np.log(2 * np.pi * var) / 2

    p, q = log_density(mean, var), log_density(true_mean, true_var)
    expected = (np.exp(p) * (p - q)).sum(0) * (x[1] - x[0])
    found = divergence(*(torch.tensor(values) for values in (mean, var, true_mean, true_var)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert found[3] == pytest.approx(0.0, abs=1e-12)


def a_layer(bias):
    """A convolution and a batch normalisation with all that makes it one of its own, some gammas negative."""
    torch.manual_seed(1)
    conv, norm = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=bias), nn.BatchNorm2d(6, eps=1e-3, momentum=0.07)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0, -0.3, 1.5, 0.8]))
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return conv, norm


@pytest.mark.parametrize("bias", [False, True])
def test_by_batches_a_float_layer_is_torch_s(bias):
    conv, norm = a_layer(bias)
    ours = QuantConv(conv, norm, None)
    ours.norm_momentum = norm.momentum
    norm.train()
    sign, shift = norm.weight.detach().sign(), conv.bias.detach() if bias else 0.0
    for x in some_batches():
        torch.testing.assert_close(ours(x), norm(conv(x)), rtol=1e-4, atol=1e-5)
        # Signs lie in the weights, and a bias that batch normalisation takes off again in the mean.
        torch.testing.assert_close(ours.mean, (norm.running_mean - shift) * sign, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.var, norm.running_var, rtol=1e-4, atol=1e-5)
    ours.norm_momentum = None
    norm.eval()
    torch.testing.assert_close(ours(x), norm(conv(x)), rtol=1e-4, atol=1e-4)


def test_by_batches_a_quantized_layer_normalises_what_it_convolves():
    conv, norm = a_layer(False)
    ours = QuantConv(conv, norm, QuantSpec(4))
    with torch.no_grad():
        ours.quantizer.scale.fill_(0.05)
    ours.norm_momentum = 0.3
    mean, var = ours.mean.clone(), ours.var.clone()
    (x,) = some_batches(1)
    signed = conv.weight * norm.weight.sign()[:, None, None, None]
    codes = torch.clamp(torch.round(signed.detach() / 0.05), -8, 7)
    h = functional.conv2d(x, codes * 0.05, stride=2, padding=1)
    expected = functional.batch_norm(h, mean, var, norm.weight.abs(), norm.bias, True, 0.3, 1e-3)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.mean, mean)
    torch.testing.assert_close(ours.var, var)


def test_switching_reaches_every_normalised_layer_and_no_other(model):
    use_batch_statistics(model, 0.1)
    assert {conv.norm_momentum for conv in normalised(model).values()} == {0.1}
    assert all(conv.norm_momentum is None for name, conv in model.convs().items() if "head" in name)
