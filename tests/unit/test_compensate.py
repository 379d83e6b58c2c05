import numpy as np
import pytest
import torch
from torch import nn

from qyolo_deploy.graph.compensate import compensate_
from qyolo_deploy.graph.layers import QuantConv
from qyolo_deploy.quant.spec import QuantSpec

SHAPES = {
    "plain": {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
    "stride": {"in_channels": 3, "out_channels": 4, "kernel_size": 5, "stride": 2, "padding": 2},
    "dilated": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "dilation": 2},
    "grouped": {"in_channels": 8, "out_channels": 4, "kernel_size": 3, "groups": 2},
    "depth-wise": {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6},
    "one by one": {"in_channels": 12, "out_channels": 5, "kernel_size": 1},
}


def make(shape, bits, granularity="per_tensor", seed=3):
    """A convolution on its grid, and correlated inputs as behind SiLU."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(**SHAPES[shape]).requires_grad_(False)
    axis = 0 if granularity == "per_channel" else None
    quantized = QuantConv(conv, None, QuantSpec(bits, granularity=granularity, axis=axis)).requires_grad_(False)
    size = conv.weight.abs().flatten(1).amax(1)
    quantized.quantizer.scale.copy_((size if axis == 0 else size.max()) / quantized.quantizer.spec.qmax)
    small = torch.randn(8, 1, 7, 7) + 0.5 * torch.randn(8, conv.in_channels, 7, 7)
    return conv, quantized, nn.functional.silu(nn.functional.interpolate(small, (20, 20), mode="bilinear"))


def deviation(quantized, weight, original, x):
    """Squared error of the output around its mean, channel by channel."""
    error = quantized.convolve(x, weight - original)
    return (error - error.mean((0, 2, 3), keepdim=True)).square().mean().item()


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_is_nearer_than_that_of_weights_rounded_to_the_nearest(shape, bits, granularity):
    errors = []
    for seed in range(4):
        conv, quantized, x = make(shape, bits, granularity, seed)
        nearest = quantized.quantized_weight()
        compensate_(quantized, x, torch.Generator().manual_seed(0))
        spec, steps = quantized.quantizer.spec, quantized.weight / quantized.weight_scale()
        assert steps.min() >= spec.qmin - 1e-3 and steps.max() <= spec.qmax + 1e-3
        errors.append([deviation(quantized, w, conv.weight, x) for w in (quantized.quantized_weight(), nearest)])
    ours, rounded = np.sum(errors, axis=0)  # a greedy method may lose a single case
    assert ours < 0.9 * rounded


def brain_surgeon(weight, hessian, scale, qmin, qmax):
    """Rounds a row by the textbook: after each weight, the inverse Hessian of those that are left (Frantar 2022)."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    inverse, rest, levels = np.linalg.inv(hessian[np.ix_(order, order)]), weight[order].copy(), np.zeros(len(weight))
    for column in range(len(weight)):
        levels[column] = np.clip(np.rint(rest[column] / scale), qmin, qmax)
        rest[column:] -= (rest[column] - levels[column] * scale) / inverse[0, 0] * inverse[0]
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return levels[np.argsort(order, kind="stable")]


def test_it_is_the_surgeon_s_step_for_each_weight():
    conv, quantized, x = make("one by one", 3)
    weight, scale = conv.weight.detach().double().numpy()[:, :, 0, 0], float(quantized.quantizer.scale)
    columns = x.permute(0, 2, 3, 1).reshape(-1, 12).double().numpy()
    covariance = np.cov(columns.T, bias=True) * len(columns)
    covariance += 0.01 * np.diag(covariance).mean() * np.eye(12)
    compensate_(quantized, x, torch.Generator().manual_seed(0))
    expected = [brain_surgeon(row, covariance, scale, -4, 3) for row in weight]
    np.testing.assert_allclose(quantized.quantized_weight().numpy()[:, :, 0, 0] / scale, expected, atol=1e-4)


def test_inputs_that_never_vary_leave_rounding_to_the_nearest():
    _, quantized, _ = make("plain", 4)
    nearest = quantized.quantized_weight().detach()
    compensate_(quantized, torch.zeros(2, 4, 8, 8), torch.Generator().manual_seed(0))
    np.testing.assert_allclose(quantized.quantized_weight(), nearest, atol=1e-6)
