"""TensorRT's dialect: what its graph holds, and that its integers are those that were trained."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from helpers.engines import run, session_of
from hypothesis import given
from hypothesis import strategies as st

from qyolo_deploy.errors import InputError
from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.export.tensorrt import fits_int8, middle_value, tensorrt_dialect, to_symmetric
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.simulate import simulate
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec


def grid(bits, zero_point, scale=0.05):
    return QParams.of(QuantSpec(bits, signed=False), scale, zero_point)


def scheme(weights, activations, **others):
    return QuantScheme(QuantSpec(weights), QuantSpec(activations, signed=False), **others)


GRIDS = st.integers(2, 8).flatmap(
    lambda bits: st.builds(grid, st.just(bits), st.integers(0, 2**bits - 1), st.floats(1e-4, 10))
)


# --- grids --------------------------------------------------------------------------------------------------


@given(GRIDS)
def test_grids_of_few_bits_are_int8_grids_as_they_are(qparams):
    codes = np.arange(qparams.spec.qmin, qparams.spec.qmax + 1)
    values = qparams.dequantize(codes)
    symmetric = to_symmetric(qparams)
    assert (symmetric.zero_point, symmetric.spec.qmin, symmetric.spec.qmax) == (0, -128, 127)
    if qparams.spec.bits < 8 or qparams.zero_point == 128:
        assert fits_int8(qparams)
    if fits_int8(qparams):
        assert symmetric.scale == qparams.scale
        np.testing.assert_array_equal(symmetric.quantize(values), codes - qparams.zero_point)
    else:
        assert symmetric.scale > qparams.scale
        # The whole range is there still, and no value is further from its code than half a step.
        assert np.abs(symmetric.fake_quantize(values) - values).max() <= float(symmetric.scale) * (0.5 + 1e-5)


@given(st.integers(0, 255), st.floats(1e-4, 10))
def test_shifted_by_the_middle_value_all_256_codes_are_those_of_int8(zero_point, scale):
    qparams = grid(8, zero_point, scale)
    codes = np.arange(256)
    shifted = qparams.dequantize(codes) - np.float32(middle_value(qparams))
    np.testing.assert_array_equal(QParams.of(QuantSpec(8), qparams.scale).quantize(shifted), codes - 128)


# --- the graph ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dialect(float_model, quantized):
    """`pico`, W4A8, with the quantizers inside SiLU left where they are."""
    return tensorrt_dialect(float_model, quantized)


def nodes_of(model, kind):
    return [node for node in model.graph if node.op_type == kind]


def test_it_holds_nothing_that_tensorrt_refuses(dialect):
    onnx.checker.check_model(ir.to_proto(dialect.model), full_check=True)
    for node in (*nodes_of(dialect.model, "QuantizeLinear"), *nodes_of(dialect.model, "DequantizeLinear")):
        if len(node.inputs) > 2:
            zero_point = node.inputs[2].const_value
            assert zero_point.dtype == ir.DataType.INT8
            assert not zero_point.numpy().any()
        # No Clip, no Cast between the integers and the values.
        assert (
            node.op_type == "QuantizeLinear"
            or node.inputs[0].const_value is not None
            or (node.inputs[0].producer().op_type == "QuantizeLinear")
        )
    for conv in nodes_of(dialect.model, "Conv"):
        assert conv.inputs[2].const_value.dtype == ir.DataType.FLOAT


def test_every_tensor_is_told_of(dialect, quantized):
    rounded = {node.inputs[0].name for node in nodes_of(dialect.model, "QuantizeLinear")}
    assert dialect.tensors <= len(rounded)  # parts of split tensors are rounded again
    assert dialect.float_layers == ("model.0.conv",)
    for name, ratio in dialect.coarser.items():
        assert not fits_int8(quantized.activations[name])
        assert 1 < ratio <= 255 / 127
    for name in dialect.shifted:
        assert not fits_int8(quantized.activations[name])
    assert not set(dialect.shifted) & set(dialect.coarser)
    assert dialect.shifted and dialect.coarser


def test_terms_of_a_residual_sum_are_rounded_and_what_is_joined_has_one_scale(dialect):
    producers = {value.name: node for node in dialect.model.graph for value in node.outputs}
    for add in nodes_of(dialect.model, "Add"):
        if all(value.const_value is None for value in add.inputs) and "model." in add.outputs[0].name:
            assert {producers[value.name].op_type for value in add.inputs} == {"DequantizeLinear"}
    joined = [node for node in nodes_of(dialect.model, "Concat") if node.outputs[0].name.startswith("model.")]
    assert joined
    for concat in joined:
        sources = [producers[value.name] for value in concat.inputs]
        assert {node.op_type for node in sources} == {"DequantizeLinear"}
        assert len({float(node.inputs[1].const_value.numpy()) for node in sources}) == 1


def test_a_tensor_that_is_not_there_is_named(float_model, quantized):
    model = float_model.clone()
    value = next(value for node in model.graph for value in node.outputs if value.name == "model.1.conv")
    value.name = "other"
    with pytest.raises(InputError, match=r"no tensor 'model\.1\.conv'"):
        tensorrt_dialect(model, quantized)


# --- what it computes ---------------------------------------------------------------------------------------


def codes_of(model, names):
    """Function from images to the int8 codes of tensors in the graph, by name."""
    proto = ir.to_proto(model)
    makers = {name: node for node in proto.graph.node for name in node.output}
    codes = [makers[f"{name}.dequantized"].input[0] for name in names]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, None) for name in codes)
    session = session_of(proto.SerializeToString())
    return lambda images: dict(zip(names, session.run(codes, {"images": images.numpy()}), strict=True))


@pytest.fixture(scope="module")
def few_bits(pico, make_prepared):
    """`pico` at W4A4 whose image and last layers have 4 bits too, and nothing inside SiLU is rounded."""
    from conftest import set_ranges

    from qyolo_deploy.graph.prepare import prepare

    generator = torch.Generator().manual_seed(3)
    model = prepare(pico, scheme(4, 4, first_last_bits=4), inside_activations=False).eval()
    set_ranges(model, torch.rand(1, 3, 64, 64, generator=generator))
    return freeze(model, {})


def test_grids_of_few_bits_give_the_codes_of_the_view(pico, few_bits, float_model):
    """With nothing coarser, the graph computes what was trained: only ties may turn, and few are."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    exact = {name: g for name, g in few_bits.activations.items() if fits_int8(g)}
    made = tensorrt_dialect(float_model, few_bits)
    assert not set(made.coarser) & set(exact)
    first = "model.0.act.mul"
    found = codes_of(made.model, [first])(images)[first].astype(int)
    view = simulate(pico, few_bits)
    seen = {}
    view.core.get_submodule("model.0.conv").register_forward_hook(lambda _, __, output: seen.update(x=output))
    with torch.no_grad():
        view(images)
    qparams = few_bits.activations[first]
    expected = qparams.quantize(torch.nn.functional.silu(seen["x"]).numpy()) - qparams.zero_point
    assert found.min() >= -qparams.zero_point and found.max() <= qparams.spec.qmax - qparams.zero_point
    assert (found != expected).mean() < 1e-3


def test_a_clip_keeps_codes_on_their_grid(few_bits, float_model):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(6)) * 3 - 1  # no image, far outside
    made = tensorrt_dialect(float_model, few_bits)
    names = [name for name, g in few_bits.activations.items() if g.spec.bits == 4]
    for name, codes in codes_of(made.model, names)(images).items():
        qparams = few_bits.activations[name]
        assert codes.min() >= -int(qparams.zero_point), name
        assert codes.max() <= qparams.spec.qmax - int(qparams.zero_point), name
    assert made.clips


def errors(output, expected):
    """Mean difference of scores, and of boxes as a share of their spread."""
    scores = np.abs(output[:, 4:] - expected[:, 4:]).mean()
    return scores, np.abs(output[:, :4] - expected[:, :4]).mean() / expected[:, :4].std()


@pytest.fixture(scope="module")
def official_errors(official, make_prepared, photographs):
    """Function from a dialect of the official yolov5n at W8A8 to its errors against the view without `inner`."""
    detector, quantized, model = official
    inner = make_prepared(detector).placement.inner
    with torch.no_grad():
        expected = simulate(detector, quantized, inner)(photographs).numpy()

    def of(**options):
        made = tensorrt_dialect(model, quantized, inner, **options)
        output = np.concatenate([run(made.model, image[None]) for image in photographs])
        return errors(output, expected)

    return of


def test_eight_bits_come_near_the_view(official_errors):
    score_error, box_error = official_errors()
    assert score_error <= 3e-4
    assert box_error <= 0.1


def test_half_precision_changes_little(official_errors):
    plain, half = official_errors(), official_errors(fp16=True)
    assert half != plain
    assert half[0] <= plain[0] * 1.5
    assert half[1] <= plain[1] * 1.5


def test_half_precision_is_for_float_convolutions_alone(float_model, quantized):
    made = tensorrt_dialect(float_model, quantized, fp16=True).model
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(made), check_type=True, strict_mode=True)
    half = {v.name for v in proto.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    assert sorted(makers[name] for name in half if name in makers) == ["Cast", "Conv"]


# --- shifting -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_readers():
    """Function from the padding of one of two readers of a tensor to its float graph and integers."""

    def make(padding):
        from torch import nn

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
                self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=padding)

            def forward(self, x):
                x = self.act(self.stem(x))
                return self.left(x), self.right(x)

        torch.manual_seed(0)
        return Network().eval()

    return make


@pytest.mark.parametrize(("padding", "shifted"), [(0, True), (1, False)])
def test_only_where_no_reader_pads_a_tensor_is_shifted(two_readers, make_scheme, padding, shifted):
    from types import SimpleNamespace

    from conftest import set_ranges

    from qyolo_deploy.graph.prepare import prepare
    from qyolo_deploy.graph.simulate import View, fold_norms
    from qyolo_deploy.graph.trace import trace

    network = two_readers(padding)
    detector = SimpleNamespace(core=network, spec=SimpleNamespace(to_json=dict), decode=lambda maps: maps[0])
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    prepared = prepare(detector, scheme(8, 8, first_last_bits=8)).eval()
    set_ranges(prepared, images)
    integers = freeze(prepared, {})
    traced = trace(network)
    fold_norms(traced)

    class Sum(torch.nn.Module):
        def forward(self, maps):
            return (maps[0].mean((2, 3)) + maps[1].mean((2, 3)))[..., None]

    model = export_float(View(traced.eval(), Sum()).eval(), 16, dynamic=False)
    made = tensorrt_dialect(model, integers)
    assert ("act" in made.shifted) == shifted
    assert ("act" in made.coarser) != shifted
    biases = {node.outputs[0].name: node.inputs[2].const_value.numpy() for node in nodes_of(made.model, "Conv")}
    layer = integers.layers["left"]
    plain = layer.bias * integers.bias_scale("left").astype(np.float64)
    if not shifted:
        np.testing.assert_allclose(biases["left"], plain, rtol=1e-6)
        return
    # The constant by hand: 128 - z steps of the input on each weight, as codes are 128 lower and the zero is at z.
    source = integers.activations["act"]
    steps = 128 - int(source.zero_point)
    added = steps * integers.bias_scale("left").astype(np.float64) * layer.weight.astype(int).sum((1, 2, 3))
    np.testing.assert_allclose(biases["left"], plain + added, rtol=1e-5, atol=1e-6)
