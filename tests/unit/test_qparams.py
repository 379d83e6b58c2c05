import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qyolo_deploy.errors import InputError
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantSpec

# Container of ONNX, and the grid that fills it.
CONTAINERS = {
    "int8": (TensorProto.INT8, QuantSpec(8)),
    "uint8": (TensorProto.UINT8, QuantSpec(8, signed=False)),
    "int4": (TensorProto.INT4, QuantSpec(4)),
    "uint4": (TensorProto.UINT4, QuantSpec(4, signed=False)),
}


def per_channel(spec, axis):
    return QuantSpec(spec.bits, spec.signed, spec.narrow_range, "per_channel", axis)


def run_onnx(qparams, container, real):
    """Integers of QuantizeLinear and reals of DequantizeLinear as ONNX Runtime computes them, unoptimised."""
    points = helper.make_tensor("z", container, qparams.zero_point.shape, qparams.zero_point.flatten().tolist())
    scales = helper.make_tensor("s", TensorProto.FLOAT, qparams.scale.shape, qparams.scale.flatten().tolist())
    axis = {} if qparams.spec.axis is None else {"axis": qparams.spec.axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **axis),
        helper.make_node("Cast", ["q"], ["i"], to=TensorProto.INT32),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **axis),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, real.shape)],
        [
            helper.make_tensor_value_info("i", TensorProto.INT32, real.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, real.shape),
        ],
        [scales, points],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": real})


def hard_values(scale, rng):
    """Values all over the grid and beyond it, exact ties, their float32 neighbours, zeros and huge values."""
    ties = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * np.float32(scale)
    return np.concatenate(
        [
            rng.normal(0, 60 * scale, 4000).astype(np.float32),
            ties,
            np.nextafter(ties, np.float32(np.inf)),
            np.nextafter(ties, np.float32(-np.inf)),
            np.array([0.0, -0.0, 1e30, -1e30, np.inf, -np.inf, 1e-40], np.float32),
        ]
    )


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("scale", [0.03125, 0.1, 1 / 3, 7.3e-4, 2.9])
def test_onnxruntime_gives_the_same_integers_and_reals(kind, scale):
    container, spec = CONTAINERS[kind]
    real = hard_values(scale, np.random.default_rng(1))
    points = {0, spec.qmin, spec.qmax, (spec.qmin + spec.qmax) // 2 + 1}
    for zero_point in sorted(points):
        qparams = QParams.of(spec, scale, zero_point)
        integers, dequantized = run_onnx(qparams, container, real)
        np.testing.assert_array_equal(qparams.quantize(real), integers)
        np.testing.assert_array_equal(qparams.dequantize(integers), dequantized)
        np.testing.assert_array_equal(qparams.fake_quantize(real), dequantized)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_onnxruntime_gives_the_same_along_an_axis(kind, axis):
    container, spec = CONTAINERS[kind]
    rng = np.random.default_rng(2)
    real = rng.normal(0, 4, (5, 4, 3, 6)).astype(np.float32)
    channels = real.shape[axis]
    points = rng.integers(spec.qmin, spec.qmax + 1, channels)
    qparams = QParams.of(per_channel(spec, axis), rng.uniform(0.005, 0.2, channels), points)
    integers, dequantized = run_onnx(qparams, container, real)
    np.testing.assert_array_equal(qparams.quantize(real), integers)
    np.testing.assert_array_equal(qparams.dequantize(integers), dequantized)


def test_ties_go_to_the_even_integer_before_the_zero_point_is_added():
    real = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    spec = QuantSpec(8, signed=False)
    assert QParams.of(spec, 1.0, 0).quantize(real).tolist() == [0, 0, 0, 0, 2, 2]
    # An odd zero point: rounding after adding it would give 4, 4, 6 and so on.
    assert QParams.of(spec, 1.0, 5).quantize(real).tolist() == [3, 3, 5, 5, 7, 7]


def test_values_beyond_the_grid_get_its_ends():
    real = np.array([-np.inf, -1e38, 1e38, np.inf], np.float32)
    qparams = QParams.of(QuantSpec(3), 1e-30)
    assert qparams.quantize(real).tolist() == [-4, -4, 3, 3]


def test_integers_and_reals_have_their_types_and_shapes():
    real = np.zeros((2, 3, 4), np.float32)
    qparams = QParams.of(per_channel(QuantSpec(8), 1), np.ones(3))
    assert (qparams.quantize(real).dtype, qparams.quantize(real).shape) == (np.int32, real.shape)
    stored = qparams.dequantize(np.zeros((2, 3, 4), np.int8))
    assert (stored.dtype, stored.shape) == (np.float32, real.shape)


def test_the_lowest_code_of_a_byte_is_dequantized_without_overflow():
    qparams = QParams.of(QuantSpec(8), 1.0, 127)
    assert qparams.dequantize(np.array([-128], np.int8)).tolist() == [-255.0]


def test_one_zero_point_serves_all_channels():
    qparams = QParams.of(per_channel(QuantSpec(8, signed=False), 0), [1.0, 2.0], 128)
    assert qparams.zero_point.tolist() == [128, 128]
    qparams.zero_point[0] = 1  # a copy of its own, not a view of one value
    assert qparams.zero_point.tolist() == [1, 128]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e-60])
def test_scales_must_be_finite_and_positive(scale):
    with pytest.raises(InputError, match="finite and positive"):
        QParams.of(QuantSpec(8), scale)


@pytest.mark.parametrize(("spec", "point"), [(QuantSpec(8), 128), (QuantSpec(4), -9), (QuantSpec(8, signed=False), -1)])
def test_zero_points_must_lie_on_the_grid(spec, point):
    with pytest.raises(InputError, match="zero point lies outside"):
        QParams.of(spec, 1.0, point)


@pytest.mark.parametrize(
    ("spec", "scale", "zero_point"),
    [
        (QuantSpec(8), np.ones(3, np.float32), np.zeros(3, np.int32)),
        (per_channel(QuantSpec(8), 0), np.ones((), np.float32), np.zeros((), np.int32)),
        (per_channel(QuantSpec(8), 0), np.ones(3, np.float32), np.zeros(2, np.int32)),
        (per_channel(QuantSpec(8), 0), np.ones((3, 1), np.float32), np.zeros((3, 1), np.int32)),
    ],
    ids=["array per tensor", "scalar per channel", "lengths differ", "two axes"],
)
def test_shapes_must_fit_the_granularity(spec, scale, zero_point):
    with pytest.raises(InputError, match=spec.granularity):
        QParams(spec, scale, zero_point)


@pytest.mark.parametrize(("scale", "point"), [(np.float64, np.int32), (np.float32, np.int64), (np.float32, np.uint8)])
def test_types_must_be_those_of_the_file_format(scale, point):
    with pytest.raises(InputError, match="scale is"):
        QParams(QuantSpec(8), np.ones((), scale), np.zeros((), point))
