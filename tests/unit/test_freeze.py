import numpy as np
import pytest
import torch
from helpers.layers import assert_integers_compute_the_layers

from qyolo_deploy.graph.freeze import activation_qparams, freeze
from qyolo_deploy.graph.simulate import simulate
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

KINDS = ["pico", "yolov5"]


def float64(tensor):
    return tensor.detach().double().numpy()


def norm_of(core, name):
    """The batch normalisation beside a convolution in YOLO's blocks; the head's last ones have none."""
    return core.get_submodule(name.removesuffix("conv") + "bn") if name.endswith(".conv") else None


def original(core, name):
    """Weight, and factor and bias behind it, in float64, straight from the detector's own modules."""
    conv, norm = core.get_submodule(name), norm_of(core, name)
    bias = np.zeros(conv.out_channels) if conv.bias is None else float64(conv.bias)
    if norm is None:
        return float64(conv.weight), np.ones(conv.out_channels), bias
    factor = float64(norm.weight) / np.sqrt(float64(norm.running_var) + norm.eps)
    return float64(conv.weight), factor, float64(norm.bias) + (bias - float64(norm.running_mean)) * factor


@pytest.fixture(scope="module")
def frozen(make_detector, make_prepared):
    made = {}
    for kind in KINDS:
        detector = make_detector(kind)
        model = make_prepared(detector)
        made[kind] = detector, model, freeze(model, {"recipe": "ab"})
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_integers_times_scales_are_the_float_network_on_its_grid(frozen, kind):
    detector, model, quantized = frozen[kind]
    negative = 0
    for name, layer in quantized.layers.items():
        weight, factor, bias = original(detector.core, name)
        step = np.float32(model.convs()[name].quantizer.scale.detach())
        sign = np.where(factor < 0, -1.0, 1.0)
        negative += (sign < 0).sum()
        spec = layer.qparams.spec
        turned = (weight * sign[:, None, None, None]).astype(np.float32)
        integers = np.clip(np.rint(turned / step), spec.qmin, spec.qmax)
        np.testing.assert_array_equal(layer.weight, integers, err_msg=name)
        np.testing.assert_allclose(layer.qparams.scale, np.abs(factor) * step, rtol=2**-22, err_msg=name)
        bias_step = quantized.bias_scale(name).astype(np.float64)
        assert (np.abs(layer.bias * bias_step - bias) <= bias_step * 0.5001 + 1e-6 * np.abs(bias)).all(), name
    assert negative > 20


def test_gain_and_shift_of_correction_are_folded(make_detector, make_prepared):
    detector = make_detector(seed=5)
    model = make_prepared(detector)
    before = freeze(model, {})
    generator = torch.Generator().manual_seed(0)
    for conv in model.convs().values():
        with torch.no_grad():
            conv.log_gain.copy_(torch.randn(conv.log_gain.shape, generator=generator) * 0.2)
            conv.shift.copy_(torch.randn(conv.shift.shape, generator=generator) * 0.1)
    after = freeze(model, {})
    for name, layer in after.layers.items():
        gain, shift = np.exp(float64(model.convs()[name].log_gain)), float64(model.convs()[name].shift)
        _, factor, bias = original(detector.core, name)
        np.testing.assert_array_equal(layer.weight, before.layers[name].weight)
        np.testing.assert_allclose(layer.qparams.scale, before.layers[name].qparams.scale * gain, rtol=1e-6)
        # The correction sits on the convolution with its sign turned, before the mean is taken off; layers
        # without batch normalisation have their bias inside, so that the gain scales it too.
        has_norm = norm_of(detector.core, name) is not None
        expected = bias + shift * np.abs(factor) if has_norm else bias * gain + shift
        step = after.bias_scale(name).astype(np.float64)
        assert (np.abs(layer.bias * step - expected) <= step * 0.5001 + 1e-6 * np.abs(expected)).all(), name


def test_activations_are_those_of_the_groups(frozen):
    _, model, quantized = frozen["pico"]
    assert set(quantized.activations) == set(model.placement.groups)
    for name, group in model.placement.groups.items():
        found, expected = quantized.activations[name], activation_qparams(model.quantizers()[group])
        assert found.spec == expected.spec == model.placement.specs[group]
        assert (found.scale, found.zero_point) == (expected.scale, expected.zero_point)
        assert found.dequantize(found.zero_point[None]).item() == 0.0


def test_names_bits_and_lineage(frozen):
    detector, model, quantized = frozen["pico"]
    assert quantized.scheme == "w4a8"
    assert quantized.lineage == {"recipe": "ab"}
    assert quantized.architecture == detector.spec.to_json()
    assert list(quantized.layers) == list(model.convs())
    assert {name: layer.input for name, layer in quantized.layers.items()} == model.placement.inputs
    ends = {"model.0.conv", *(f"model.22.cv{branch}.{level}.2" for branch in (2, 3) for level in range(3))}
    assert {name for name, layer in quantized.layers.items() if layer.qparams.spec.bits == 7} == ends  # reduced range
    assert all(layer.qparams.spec.axis == 0 for layer in quantized.layers.values())


def test_layers_in_float_are_folded_in_float(make_detector, make_prepared, make_scheme):
    detector = make_detector()
    kept = ["model.3.conv", "model.22.cv2.0.2"]
    quantized = freeze(make_prepared(detector, make_scheme(keep_float=kept)), {})
    assert set(quantized.float_tensors) == {f"{name}.{part}" for name in kept for part in ("weight", "bias")}
    assert not set(kept) & set(quantized.layers)
    for name in kept:
        weight, factor, bias = original(detector.core, name)
        folded = weight * factor[:, None, None, None]
        np.testing.assert_allclose(quantized.float_tensors[f"{name}.weight"], folded, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(quantized.float_tensors[f"{name}.bias"], bias, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_integer_layer_computes_what_the_layer_learned(bits, granularity, make_detector, make_prepared, images):
    """Layer by layer, because a network of random weights makes noise out of one code that a tie turned."""
    axis = 0 if granularity == "per_channel" else None
    scheme = QuantScheme(QuantSpec(bits, granularity=granularity, axis=axis), QuantSpec(8, signed=False))
    detector = make_detector(seed=3)
    model = make_prepared(detector, scheme)
    quantized = freeze(model, {})
    assert_integers_compute_the_layers(model, quantized, simulate(detector, quantized), images)


def test_a_saved_model_simulates_the_same(quantized, pico, images, tmp_path):
    quantized.save(tmp_path / "model.safetensors")
    loaded = QuantizedModel.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(simulate(pico, loaded)(images), simulate(pico, quantized)(images))


def test_the_integer_view_depends_on_nothing_but_architecture_and_integers(quantized, make_detector, pico, images):
    other = make_detector(seed=99)
    assert not torch.equal(other.core.model[0].conv.weight, pico.core.model[0].conv.weight)
    with torch.no_grad():
        assert torch.equal(simulate(other, quantized)(images), simulate(pico, quantized)(images))


def test_a_dead_channel_keeps_its_bias_and_fits_int32(make_detector, make_prepared, images):
    """Gamma 0 leaves a channel its bias alone, which is far beyond int32 in steps of its vanishing scale."""
    detector = make_detector(seed=4)
    norm = detector.core.model[1].bn
    with torch.no_grad():
        norm.weight[:3] = torch.tensor([0.0, 1e-12, -1e-9])
        norm.bias[:3] = torch.tensor([0.5, -3.0, 0.0])
    quantized = freeze(make_prepared(detector), {})
    layer = quantized.layers["model.1.conv"]
    reals = layer.bias[:3] * quantized.bias_scale("model.1.conv")[:3].astype(np.float64)
    np.testing.assert_allclose(reals, [0.5, -3.0, 0.0], atol=1e-4)
    maps = simulate(detector, quantized).core(images)
    assert all(torch.isfinite(raw).all() for raw in maps)
