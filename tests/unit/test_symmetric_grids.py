"""Activations on 8-bit grids around 0: what is trained for TensorRT is what its dialect computes, layer by layer."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from helpers.engines import optimised, session_of
from torch import fx

from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.export.tensorrt import fits_int8, tensorrt_dialect
from qyolo_deploy.graph.fake_quantize import Quantizer
from qyolo_deploy.graph.freeze import activation_qparams, freeze
from qyolo_deploy.graph.prepare import prepare
from qyolo_deploy.graph.ranges import Sample, observe
from qyolo_deploy.graph.simulate import fold_float, simulate
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

FIRST = "model.0.conv"
SIDES = (64, 96)


def symmetric(weights, activations=8):
    """For TensorRT alone nothing inside activations is rounded; ends have 8 bits."""
    return QuantScheme(QuantSpec(weights), QuantSpec(activations))


@pytest.fixture(scope="module")
def pictures():
    """float32 `[2, 3, 64, 96]` of whole pixel values with both ends among them, so that rounding takes nothing away."""
    generator = torch.Generator().manual_seed(11)
    coarse = torch.rand(2, 3, 8, 12, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, SIDES, mode="bilinear")
    pixels = torch.round((smooth + 0.1 * torch.rand(2, 3, *SIDES, generator=generator)).clamp(0, 1) * 255)
    pixels[:, :, 0, 0], pixels[:, :, 0, 1] = 0, 255
    return pixels / 255


@pytest.fixture(scope="module")
def make(make_detector, pictures):
    """Function from an architecture and a scheme to detector, prepared model and integers."""
    from conftest import set_ranges

    def build(kind, scheme, inside=False):
        detector = make_detector(kind)
        prepared = prepare(detector, scheme, inside_activations=inside).eval()
        set_ranges(prepared, pictures)
        for quantizer in prepared.quantizers().values():
            if quantizer.spec.signed:  # the ranges are of grids with an offset
                low, high = quantizer.offset, quantizer.offset + quantizer.scale * quantizer.spec.qmax
                quantizer.scale.data = torch.maximum(-low / 128, high / 127)
                quantizer.offset.data.zero_()
        return detector, prepared, freeze(prepared, {})

    return build


# --- which grids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pico", "yolov5", "yolo11n"])
@pytest.mark.parametrize("inside", [False, True])
def test_all_that_integers_are_computed_with_is_around_0(make, kind, inside):
    _, prepared, integers = make(kind, symmetric(8), inside)
    placement = prepared.placement
    maps = [str(node.target).removeprefix("quantizers.") for node in prepared.graph.graph.output_node().args[0]]
    aside = {"images", *maps, *placement.inner}
    for name, grid in integers.activations.items():
        assert not grid.spec.signed
        if name not in aside:
            assert (grid.spec.bits, int(grid.zero_point)) == (8, 128), name
    image = integers.activations["images"]
    assert int(image.zero_point) == 0 and float(image.scale) == pytest.approx(1 / 255)
    assert placement.inner if inside else not placement.inner


def test_grids_of_fewer_bits_keep_their_zero_points(make):
    _, prepared, integers = make("pico", symmetric(4, 4))
    bits = {name: (grid.spec.bits, int(grid.zero_point)) for name, grid in integers.activations.items()}
    assert {point for width, point in bits.values() if width == 4} - {0, 8}  # learned ones
    read_by_heads = {layer.input for name, layer in integers.layers.items() if bits[layer.input][0] == 8}
    assert read_by_heads - {"images"}
    assert all(bits[name] == (8, 128) for name in read_by_heads - {"images"})
    assert all(
        quantizer.offset.requires_grad for quantizer in prepared.quantizers().values() if quantizer.spec.bits == 4
    )


def test_unsigned_codes_stand_for_the_same_values():
    quantizer = Quantizer(QuantSpec(8))
    quantizer.scale.data.fill_(0.037)
    x = torch.linspace(-6, 6, 2001)
    grid = activation_qparams(quantizer)
    np.testing.assert_array_equal(grid.fake_quantize(x.numpy()), quantizer(x).detach().numpy())
    assert grid.fake_quantize(x.numpy()).min() == np.float32(-128) * grid.scale
    assert grid.fake_quantize(x.numpy()).max() == np.float32(127) * grid.scale


@pytest.mark.parametrize("observer", ["mse", "minmax", "moving_average", "percentile", "entropy"])
def test_ranges_of_one_side_keep_their_end(observer):
    """Of values that hardly fall below 0, as behind SiLU, half of the levels are spent; not more."""
    sample = Sample()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        sample.add(torch.nn.functional.silu(torch.randn(40_000, generator=generator) * 2), generator)
    scale, offset = observe(observer, sample, QuantSpec(8))
    values = torch.cat(sample.values)
    assert offset == 0
    assert 0.5 * values.max() < scale * 127 < 1.05 * torch.stack(sample.highs).max()
    rounded = torch.clamp(torch.round(values / scale), -128, 127) * scale
    assert torch.square(rounded - values).mean() < 1e-3 * torch.square(values).mean()


# --- what TensorRT computes ---------------------------------------------------------------------------------


class Forced(fx.Interpreter):
    """Runs a view in which every rounded tensor, once it is compared, is replaced by what another runtime has."""

    def __init__(self, view, quantized, steps):
        super().__init__(view.core)
        self.quantized, self.steps, self.found = quantized, steps, {}

    def run_node(self, n):
        value = super().run_node(n)
        name = str(n.target).removeprefix("quantizers.")
        # A convolution's own grid is in its module; what else is rounded is followed by a module of its own.
        is_rounding = n.op == "call_module" and (name != n.target or name not in self.quantized.activations)
        is_integer = type(self.fetch_attr(n.target)).__name__.startswith("Integer") if n.op == "call_module" else False
        if name not in self.steps or not (is_rounding or is_integer):
            return value
        scale = np.float32(self.quantized.activations[name].scale)
        self.found[name] = np.rint(value.numpy() / scale)
        return torch.from_numpy(self.steps[name].astype(np.float32) * scale)


def dialect_steps(model, names, images):
    """int8 codes of tensors in a dialect's graph, as ONNX Runtime computes them; they are steps from 0."""
    proto = ir.to_proto(model)
    makers = {name: node for node in proto.graph.node for name in node.output}
    codes = [makers[f"{name}.dequantized"].input[0] for name in names]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, None) for name in codes)
    found = session_of(proto.SerializeToString()).run(codes, {"images": images.numpy()})
    return dict(zip(names, (value.astype(int) for value in found), strict=True))


def check_layers(model, detector, integers, pictures):
    """Layer by layer, on the inputs that the dialect's graph has: only ties may turn, and few are."""
    view, dialect = simulate(detector, integers), tensorrt_dialect(model, integers)
    assert not dialect.coarser and not dialect.shifted
    assert dialect.float_layers == (FIRST,)
    maps = {str(node.target) for node in view.core.graph.output_node().args[0]}
    rounded = [name for name in integers.activations if name != "images" and name not in maps]
    assert all(fits_int8(integers.activations[name]) for name in rounded)
    assert len(rounded) == dialect.tensors
    steps = dialect_steps(dialect.model, rounded, pictures)
    forced = Forced(view, integers, steps)
    with torch.no_grad():
        forced.run(pictures)
    assert set(forced.found) == set(rounded)
    differing = {name: np.abs(forced.found[name] - steps[name]) for name in rounded}
    assert max(values.max() for values in differing.values()) <= 1
    turned = sum(np.count_nonzero(values) for values in differing.values())
    assert turned <= 1e-4 * sum(values.size for values in differing.values())


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 8), (4, 4)])
def test_every_layer_of_the_dialect_gives_the_codes_of_the_view(make, float_model, pictures, weights, activations):
    detector, _, integers = make("pico", symmetric(weights, activations))
    check_layers(float_model, detector, integers, pictures)


@pytest.mark.slow
def test_so_do_residual_sums_and_heads_with_anchors(make, pictures):
    detector, _, integers = make("yolov5", symmetric(8))
    check_layers(export_float(fold_float(detector), SIDES[0], dynamic=True), detector, integers, pictures)


def test_onnx_runtime_computes_such_grids_in_unsigned_integers(make, float_model, tmp_path):
    _, _, integers = make("pico", symmetric(8), inside=True)
    graph = optimised(insert_qdq(float_model, integers), tmp_path)
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QLinearConv") == len(integers.layers) and "Conv" not in kinds
