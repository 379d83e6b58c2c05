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
from qyolo_deploy.graph.fake_quantize import MIN_SCALE, GradientRules, Quantizer, fake_quantize, zero_point_of
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantSpec

SPECS = [QuantSpec(2), QuantSpec(4), QuantSpec(8), QuantSpec(4, signed=False), QuantSpec(8, signed=False)]
CHANNELS = 5


def per_channel(spec):
    return QuantSpec(spec.bits, spec.signed, granularity="per_channel", axis=0)


def make_case(spec, channels, seed=0):
    """x, scale, offset and an incoming gradient; offsets lie on the grid, so that the papers' integer is ours."""
    rng = np.random.default_rng(seed)
    shape = (channels,) if channels else ()
    scale = rng.uniform(0.02, 0.3, shape).astype(np.float32)
    zero_point = np.zeros(shape) if spec.signed else rng.integers(0, spec.qmax // 2 + 1, shape)
    offset = (-zero_point * scale).astype(np.float32)
    levels = rng.uniform(spec.qmin - 4, spec.qmax + 4, (channels or 1, 4, 3, 3))
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
    below, above = v < spec.qmin, v > spec.qmax
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
    """With the rounding error held fixed, `s clip(v + error, qmin, qmax) + offset` is smooth between the ends."""
    x, scale, offset, grad = make_case(spec, 0, seed=3)
    v = (x.astype(np.float64) - offset) / scale
    ends = [np.abs(v - end) > 0.51 for end in (spec.qmin, spec.qmax)]  # there clipping bends the surrogate
    smooth = ends[0] & ends[1]
    x, grad, v = x[smooth], grad[smooth], v[smooth]
    assert x.size > 10
    _, to_x, to_scale, to_offset = run(x, scale, offset, grad, spec)
    error = np.rint(v) - v

    def loss(x, scale, offset):
        return grad * (scale * np.clip((x - offset) / scale + error, spec.qmin, spec.qmax) + offset)

    def slope(index, step=1e-6):
        at = [x.astype(np.float64), float(scale), float(offset)]
        up, down = ([value + sign * step * (i == index) for i, value in enumerate(at)] for sign in (1, -1))
        return (loss(*up) - loss(*down)) / (2 * step)

    np.testing.assert_allclose(to_x, slope(0), rtol=1e-5, atol=1e-6)
    assert to_scale == pytest.approx(slope(1).sum(), rel=1e-4, abs=1e-3)
    assert to_offset == pytest.approx(slope(2).sum(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("channels", [0, CHANNELS], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_are_those_of_the_numpy_reference_bit_for_bit(spec, channels):
    rng = np.random.default_rng(5)
    shape = (channels,) if channels else ()
    scale = rng.uniform(0.001, 0.3, shape).astype(np.float32)
    offset = np.zeros(shape, np.float32) if spec.signed else -rng.uniform(0, 4, shape).astype(np.float32)
    x = rng.normal(0, 3, (channels or 2, 3, 8, 8)).astype(np.float32)
    ties = (np.round(x / widen(scale, x)) + 0.5) * widen(scale, x)
    x = np.concatenate([x, ties], 1).astype(np.float32)
    zero_point = zero_point_of(torch.tensor(scale), torch.tensor(offset), spec.qmin, spec.qmax).numpy()
    qparams = QParams.of(per_channel(spec) if channels else spec, scale, zero_point.astype(np.int32))
    found = fake_quantize(torch.tensor(x), torch.tensor(scale), torch.tensor(offset), qparams.spec)
    np.testing.assert_array_equal(found.numpy(), qparams.fake_quantize(x))


def test_zero_is_always_a_level():
    """Padding is exact: whatever the offset has learned, 0.0 stays 0.0."""
    scale = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.01
    offset = -torch.rand(50, generator=torch.Generator().manual_seed(1)) * 5
    spec = QuantSpec(4, False, False, "per_channel", 0)
    assert torch.equal(fake_quantize(torch.zeros(50, 7), scale, offset, spec), torch.zeros(50, 7))


def test_a_switched_off_quantizer_passes_on():
    quantizer = Quantizer(QuantSpec(2))
    quantizer.enabled = False
    x = torch.randn(10)
    assert quantizer(x) is x


def test_signed_grids_learn_no_offset():
    assert not Quantizer(QuantSpec(8)).offset.requires_grad
    assert Quantizer(QuantSpec(8, signed=False)).offset.requires_grad


def test_clamping_brings_scale_and_offset_back():
    quantizer = Quantizer(QuantSpec(4, False, False, "per_channel", 0), 4)
    with torch.no_grad():
        quantizer.scale.copy_(torch.tensor([-1.0, 0.0, 0.5, 0.5]))
        quantizer.offset.copy_(torch.tensor([-1.0, 1.0, -100.0, 0.25]))
    quantizer.clamp_()
    assert quantizer.scale.tolist() == pytest.approx([MIN_SCALE, MIN_SCALE, 0.5, 0.5])
    assert quantizer.offset.tolist() == pytest.approx([-15 * MIN_SCALE, 0.0, -7.5, 0.0])
    point = zero_point_of(quantizer.scale, quantizer.offset, 0, 15)
    QParams.of(quantizer.spec, quantizer.scale.detach().numpy(), point.detach().numpy().astype(np.int32))


# --- rules for gradients ---


def gradients(spec, rules, channels=0, shape=(5, 4, 3, 3)):
    """Gradients of a quantizer and the paper's parts of each element; `channels` are those of weights."""
    x, scale, offset, _ = make_case(spec, CHANNELS if spec.axis == 0 else 0)
    x = np.resize(x, shape)
    grad = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    quantizer = Quantizer(spec, channels)
    with torch.no_grad():
        quantizer.scale.copy_(torch.tensor(scale))
        quantizer.offset.copy_(torch.tensor(offset))
    quantizer.rules = rules
    tensor = torch.tensor(x, requires_grad=True)
    quantizer(tensor).backward(torch.tensor(grad))
    found = tensor.grad.numpy(), quantizer.scale.grad.numpy(), quantizer.offset.grad
    return found, grad, paper(x, scale, offset, spec)[1:], (x.astype(np.float64) - widen(offset, x)) / widen(scale, x)


@pytest.mark.parametrize(
    ("spec", "channels", "features"),
    [
        (QuantSpec(4), CHANNELS, 5 * 36),  # the weights of a layer
        (per_channel(QuantSpec(4)), CHANNELS, 36),  # those of a channel
        (QuantSpec(4, signed=False), 0, 36),  # the features of one image of five
    ],
    ids=["weights per tensor", "weights per channel", "activations"],
)
def test_lsq_s_gradient_scale(spec, channels, features):
    """Esser 2020, section 2.2: `1 / sqrt(N qmax)` on the gradient to the step size, and nothing on that to x."""
    (to_x, to_scale, to_offset), grad, (d_x, d_scale, d_offset), _ = gradients(
        spec, GradientRules(lsq_scale=True), channels
    )
    factor = 1 / np.sqrt(features * (7 if spec.signed else 15))
    np.testing.assert_array_equal(to_x, (grad * d_x).astype(np.float32))
    np.testing.assert_allclose(to_scale, total(grad * d_scale, to_scale) * factor, rtol=1e-4, atol=1e-4)
    if not spec.signed:
        np.testing.assert_allclose(to_offset, total(grad * d_offset, to_scale) * factor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [QuantSpec(4), per_channel(QuantSpec(4)), QuantSpec(4, signed=False)], ids=str)
def test_values_near_a_threshold_do_not_move_the_scale(spec):
    (to_x, to_scale, _), grad, (d_x, d_scale, _), v = gradients(spec, GradientRules(margin=0.2), CHANNELS)
    near = (np.abs(v - np.floor(v) - 0.5) < 0.2) & (d_x == 1)
    assert 0.1 < near.mean() < 0.5
    expected = total(grad * np.where(near, 0, d_scale), to_scale)
    np.testing.assert_allclose(to_scale, expected, rtol=1e-4, atol=1e-3)
    assert np.abs(to_scale - total(grad * d_scale, to_scale)).max() > 0.1
    np.testing.assert_array_equal(to_x, (grad * d_x).astype(np.float32))


def test_latent_weights_between_two_levels_learn_more_slowly():
    rules = GradientRules(latent_damping=3.0)
    (to_x, to_scale, _), grad, (d_x, d_scale, _), v = gradients(QuantSpec(4), rules, CHANNELS)
    expected = grad * d_x * np.exp(-3.0 * np.abs(np.rint(v) - v))
    np.testing.assert_allclose(to_x, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(to_scale, total(grad * d_scale, to_scale), rtol=1e-4, atol=1e-3)


def test_a_grid_without_an_offset_loses_what_lies_below_zero():
    quantizer = Quantizer(QuantSpec(4, signed=False), offset=False)
    assert not quantizer.offset.requires_grad
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
    x = torch.tensor([-3.0, -0.2, 0.2, 0.8, 7.4, 9.0], requires_grad=True)
    values = quantizer(x)
    assert values.tolist() == [0.0, 0.0, 0.0, 1.0, 7.5, 7.5]
    values.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert quantizer.offset.grad is None
    assert quantizer.scale.grad.item() == pytest.approx((0 - 0.4) + (2 - 1.6) + (15 - 14.8) + 15, rel=1e-5)


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler for torch.compile"
)


@needs_compiler
@pytest.mark.parametrize("channels", [0, CHANNELS], ids=["per tensor", "per channel"])
def test_compiled_and_eager_kernels_agree(channels, monkeypatch, caplog):
    spec = QuantSpec(4, signed=False)
    case = make_case(spec, channels)
    grid = per_channel(spec) if channels else spec
    module.kernel.cache_clear()  # so that a fallback of an earlier test cannot hide here
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        compiled = run(*case, grid)
    assert not caplog.records  # no silent fallback
    monkeypatch.setattr(module, "kernel", lambda function: function)
    eager = run(*case, grid)
    for ours, theirs in zip(compiled[:2], eager[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(compiled[2:], eager[2:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)  # sums, added up in another order


def test_it_works_and_says_so_where_there_is_no_compiler(repository, tmp_path):
    script = (
        "import logging, torch; logging.basicConfig()\n"
        "from qyolo_deploy.graph.fake_quantize import Quantizer\n"
        "from qyolo_deploy.quant.spec import QuantSpec\n"
        "quantizer = Quantizer(QuantSpec(4)); x = torch.tensor([0.4, 1.6, 99.0], requires_grad=True)\n"
        "quantizer(x).sum().backward(); print(quantizer(x).tolist(), x.grad.tolist(), quantizer.scale.grad.item())\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "no compiled fake quantization" in done.stderr
    values, _, rest = done.stdout.partition("] ")
    assert values == "[0.0, 2.0, 7.0"
    gradient, _, to_scale = rest.partition("] ")
    assert gradient == "[1.0, 1.0, 0.0"
    assert float(to_scale) == pytest.approx(-0.4 + 0.4 + 7)
