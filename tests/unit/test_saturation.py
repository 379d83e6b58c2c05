from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qyolo_deploy.errors import InputError
from qyolo_deploy.export.intervals import MARGIN
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.export.saturation import low_bit_activations, shift_to_top
from qyolo_deploy.quant.model import QuantizedLayer, QuantizedModel
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantSpec

SHAPE = (1, 4, 8, 8)
SILU_LOW = 0.2784645


def grid(bits, scale, zero_point=0, signed=False):
    return QParams.of(QuantSpec(bits, signed=signed), scale, zero_point)


def model_of(body, source="x"):
    """A float model `source` -> `y` from the lines of its nodes."""
    text = f'<ir_version: 8, opset_import: ["" : 18]> g (float[1,4,8,8] {source}) => (float y) {{ {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


def quantized_of(activations):
    return QuantizedModel({}, {}, activations, {}, "w4a4")


def method_of(name, body, activations, source="x", leave_out=()):
    methods = low_bit_activations(model_of(body, source), quantized_of(activations), frozenset(leave_out))
    return methods[name]


def run(model, kinds, x, optimise=False):
    """Values of a network by name, as ONNX Runtime computes them, node by node unless it may optimise.

    `kinds` is the names with their types.
    """
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(list(kinds), {proto.graph.input[0].name: x})
    return dict(zip(kinds, found, strict=True))


def codes_and_values(model, quantized, x, clip):
    """Tensor name -> the codes of an exported model, as on the grid, and the float values that they are made of."""
    qdq = insert_qdq(model, quantized, clip=clip)
    makers = {value.name: node for node in qdq.graph for value in node.outputs}
    names = {name: makers[f"{name}.dequantized"].inputs[0].name for name in quantized.activations}
    container = {n: TensorProto.INT8 if g.spec.signed else TensorProto.UINT8 for n, g in quantized.activations.items()}
    values = [name for name in names if name in makers]  # a ReLU on codes leaves no float value behind it
    kinds = {names[n]: container[n] for n in names} | dict.fromkeys(values, TensorProto.FLOAT)
    found = run(qdq, kinds, x)
    shifts = {n: shift_to_top(g.spec) for n, g in quantized.activations.items()}
    codes = {n: found[names[n]].astype(np.int32) - shifts[n] for n in names}
    return codes, {name: found[name] for name in values}


# --- verdicts ---

FLOAT_SILU = "g = Sigmoid(x) v = Mul(x, g) y = Identity(v)"
AN_EIGHT_BIT_X = "c = Relu(x) v = Identity(c) y = Identity(v)"


@pytest.mark.parametrize(
    ("body", "scale", "zero_point", "method"),
    [
        ("v = Identity(x) y = Identity(v)", 1.0, 15, "clip"),  # no bound at all
        ("v = LeakyRelu(x) y = Identity(v)", 1.0, 15, "clip"),  # nor for operators that nobody has thought of
        ("v = Relu(x) y = Identity(v)", 0.01, 0, "saturating"),
        (FLOAT_SILU, SILU_LOW / 0.49, 0, "saturating"),
        (FLOAT_SILU, SILU_LOW / 0.4995, 0, "clip"),  # so near a tie that kernels may differ
        (FLOAT_SILU, SILU_LOW / 0.51, 0, "clip"),
        (FLOAT_SILU, SILU_LOW / 1.49, 1, "saturating"),
        (FLOAT_SILU, SILU_LOW / 1.51, 1, "clip"),
        ("g = Sigmoid(x) v = Mul(g, x) y = Identity(v)", SILU_LOW / 0.49, 0, "saturating"),
        ("g = Sigmoid(x) h = Relu(x) v = Mul(h, g) y = Identity(v)", 0.1, 0, "clip"),  # a product, not SiLU
        ("g = Sigmoid(x) h = HardSigmoid(x) v = Mul(h, g) y = Identity(v)", 0.1, 0, "saturating"),
        ("r = Relu(x) g = Sigmoid(r) v = Mul(r, g) y = Identity(v)", 0.01, 0, "saturating"),
        ("v = HardSwish(x) y = Identity(v)", 0.375 / 0.49, 0, "saturating"),
        ("v = HardSwish(x) y = Identity(v)", 0.375 / 0.51, 0, "clip"),
        ("r = Relu(x) v = HardSwish(r) y = Identity(v)", 0.01, 0, "saturating"),
        ("v = Sigmoid(x) y = Identity(v)", 0.01, 0, "saturating"),
        ("l = Constant<value_float=-1.0>() v = Clip(x, l) y = Identity(v)", 1.0, 1, "saturating"),
        ("l = Constant<value_float=-1.0>() v = Clip(x, l) y = Identity(v)", 0.6, 1, "clip"),
        ("h = Constant<value_float=-1.0>() v = Clip(x, , h) y = Identity(v)", 1.0, 1, "clip"),
        ("r = Relu(x) h = Constant<value_float=-2.0>() v = Clip(r, , h) y = Identity(v)", 1.0, 1, "clip"),
        ("r = Relu(x) m = ReduceMin<keepdims=0>(x) v = Clip(r, , m) y = Identity(v)", 1.0, 0, "clip"),
        ("a = Sigmoid(x) b = HardSwish(x) v = Add(a, b) y = Identity(v)", 0.375 / 0.49, 0, "saturating"),
        ("a = HardSwish(x) b = HardSwish(x) v = Add(a, b) y = Identity(v)", 0.375 / 0.49, 0, "clip"),
        ("a = HardSwish(x) b = Relu(x) v = Concat<axis=1>(b, a) y = Identity(v)", 0.375 / 0.49, 0, "saturating"),
        ("b = Relu(x) v = Concat<axis=1>(b, x) y = Identity(v)", 0.1, 1, "clip"),
        ("r = Relu(x) v = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(r) y = Identity(v)", 0.1, 0, "saturating"),
        ("r = Relu(x) v, w = Split<axis=1, num_outputs=2>(r) y = Concat<axis=1>(v, w)", 0.1, 0, "saturating"),
    ],
)
def test_verdict_for_a_tensor_of_four_bits(body, scale, zero_point, method):
    assert method_of("v", body, {"v": grid(4, scale, zero_point)}) == method


@pytest.mark.parametrize(
    ("attributes", "method"),
    [
        ('mode="nearest"', "saturating"),
        ('mode="cubic"', "clip"),  # overshoots
        ('mode="linear"', "clip"),
    ],
)
def test_resizing_keeps_a_bound_only_where_it_copies(attributes, method):
    body = f"r = Relu(x) s = Constant<value_floats=[1.0, 1.0, 2.0, 2.0]>() v = Resize<{attributes}>(r, , s) "
    assert method_of("v", body + "y = Identity(v)", {"v": grid(4, 0.1)}) == method


def test_images_are_between_0_and_1_and_other_inputs_anywhere():
    body = "v = Identity({0}) y = Identity(v)"
    assert method_of("v", body.format("images"), {"v": grid(4, 0.1)}, "images") == "saturating"
    assert method_of("v", body.format("x"), {"v": grid(4, 0.1)}) == "clip"
    assert method_of("images", "y = Identity(images)", {"images": grid(4, 1 / 15)}, "images") == "saturating"


def test_a_tensor_read_from_a_grid_lies_within_it():
    """Of the same grid it is safe whatever came in; of a narrower one it is not, unless what came in was narrower."""
    body = "u = {0}(x) v = Identity(u) y = Identity(v)"
    unbounded, positive = body.format("LeakyRelu"), body.format("Relu")
    same = {name: grid(4, 0.3, 5) for name in "uv"}
    assert low_bit_activations(model_of(unbounded), quantized_of(same)) == {"u": "clip", "v": "saturating"}
    narrower = {"u": grid(4, 0.3, 5), "v": grid(4, 0.3, 4)}
    assert method_of("v", unbounded, narrower) == "clip"
    assert method_of("v", positive, narrower) == "saturating"
    assert method_of("v", unbounded, narrower, leave_out=["u"]) == "clip"


def test_a_sum_of_rounded_tensors():
    body = "a = HardSwish(x) b = LeakyRelu(x) v = Add(a, b) y = Identity(v)"
    parts = {"a": grid(8, 0.01, 30), "b": grid(4, 0.5, 2)}  # lows -0.3 and -1
    assert method_of("v", body, {**parts, "v": grid(4, 0.5, 3)}) == "saturating"
    assert method_of("v", body, {**parts, "v": grid(4, 0.5, 2)}) == "clip"
    assert method_of("v", body, {**parts, "v": grid(4, 0.5, 15)}, leave_out=["b"]) == "clip"


def test_tensors_of_eight_bits_and_those_left_out_have_no_verdict():
    model = model_of("u = Relu(x) v = Relu(u) w = Relu(v) y = Relu(w)")
    activations = {"u": grid(8, 0.1), "v": grid(4, 0.1), "w": grid(2, 0.1)}
    assert low_bit_activations(model, quantized_of(activations), frozenset("w")) == {"v": "saturating"}


def test_a_tensor_that_the_graph_lacks_is_refused():
    with pytest.raises(InputError, match="no tensor 'gone'"):
        low_bit_activations(model_of("y = Relu(x)"), quantized_of({"gone": grid(4, 0.1)}))


def test_operators_of_other_domains_bound_nothing():
    model = model_of("v = Relu(x) y = Identity(v)")
    model.graph[0].domain = "somewhere.else"
    assert low_bit_activations(model, quantized_of({"v": grid(4, 0.1)})) == {"v": "clip"}


# --- SiLU with its inside rounded to 8 bits ---


@given(
    low=st.floats(-20, 0),
    high=st.floats(0.01, 20),
    gate_scale=st.sampled_from([1 / 255, 0.9 / 255, 0.003, 0.02]),
    bits=st.integers(2, 7),
    scale=st.floats(0.005, 3),
    share=st.floats(0, 1),
)
@settings(max_examples=300)
def test_silu_of_codes_is_judged_by_all_of_them(low, high, gate_scale, bits, scale, share):
    """The verdict is that of the 256 codes; only next to a tie it may be the careful one."""
    step = (high - low) / 255
    x, gate = grid(8, step, round(-low / step)), grid(8, gate_scale)
    out = grid(bits, scale, round(share * (2**bits - 1)))
    values = x.dequantize(np.arange(256))
    values = values * gate.fake_quantize(1 / (1 + np.exp(-values)))
    ratio = float((values / out.scale).min())
    lowest = np.rint(ratio) + int(out.zero_point)
    body = "c = LeakyRelu(x) g = Sigmoid(c) v = Mul(c, g) y = Identity(v)"
    method = method_of("v", body, {"c": x, "g": gate, "v": out})
    if method == "saturating":
        assert lowest >= 0
    # A sigmoid that may round either way moves the product by one level of the sigmoid.
    doubt = 2 * MARGIN + (abs(low) * gate_scale / scale if near_tie(x, gate) else 0)
    if method == "clip" and np.rint(ratio - doubt) == np.rint(ratio):
        assert lowest < 0


def test_a_sigmoid_at_a_tie_may_round_either_way():
    """Of x = -1.28 the sigmoid lies halfway between codes 0 and 1, and SiLU is 0 or -0.56."""
    x = grid(8, 1.28, 128)
    sigmoid = 1 / (1 + np.exp(1.28))
    body = "c = LeakyRelu(x) g = Sigmoid(c) v = Mul(c, g) y = Identity(v)"
    for share, method in {0.5: "clip", 0.4999: "clip", 0.49: "saturating"}.items():
        assert method_of("v", body, {"c": x, "g": grid(8, sigmoid / share), "v": grid(4, 1.0)}) == method


def test_silu_of_codes_that_nothing_rounds_to():
    body = "c = Relu(x) g = Sigmoid(c) v = Mul(c, g) y = Identity(v)"
    inner = {"c": grid(8, 0.1, 100), "g": grid(8, 1 / 255)}
    assert method_of("v", body, {**inner, "v": grid(4, 0.1)}) == "saturating"
    assert method_of("v", body.replace("Relu", "LeakyRelu"), {**inner, "v": grid(4, 0.1)}) == "clip"
    assert method_of("v", body, {"g": inner["g"], "v": grid(4, 0.1)}) == "clip"  # only the gate rounded: a product


def near_tie(x, gate):
    sigmoid = 1 / (1 + np.exp(-x.dequantize(np.arange(256)).astype(np.float64)))
    ratio = sigmoid / float(gate.scale)
    return bool((np.abs(ratio - np.floor(ratio) - 0.5) < 2 * MARGIN).any())


# --- random networks: what is claimed holds, and the codes are exact ---


@dataclass
class Network:
    """Lines of a graph, the grids of its tensors, and names to go on from."""

    lines: list = field(default_factory=list)
    grids: dict = field(default_factory=dict)
    names: list = field(default_factory=lambda: ["x"])

    @property
    def model(self):
        return model_of(" ".join([*self.lines, f"y = Identity({self.names[-1]})"]))

    @property
    def quantized(self):
        return quantized_of(self.grids)


POOL = "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>"
STEPS = {
    "relu": "{out} = Relu({a})",
    "leaky": "{out} = LeakyRelu({a})",
    "hard swish": "{out} = HardSwish({a})",
    "silu": "{out}_g = Sigmoid({a}) {out} = Mul({a}, {out}_g)",
    "product": "{out}_s = Sigmoid({b}) {out} = Mul({a}, {out}_s)",
    "add": "{out} = Add({a}, {b})",
    "pool": f"{{out}} = {POOL}({{a}})",
    "join": "{out}_c = Concat<axis=1>({a}, {b}) {out}_l, {out} = Split<axis=1, num_outputs=2>({out}_c)",
    "swap": "{out}_p, {out}_q = Split<axis=1, num_outputs=2>({a}) {out} = Concat<axis=1>({out}_q, {out}_p)",
}


@st.composite
def grids(draw):
    spec = QuantSpec(draw(st.integers(2, 8)), signed=draw(st.booleans()))
    return QParams.of(spec, 10 ** draw(st.floats(-2, 0.3)), draw(st.integers(spec.qmin, spec.qmax)))


@st.composite
def networks(draw):
    network = Network()
    for number in range(draw(st.integers(1, 7))):
        out, pick = f"v{number}", st.sampled_from(network.names)
        kind = draw(st.sampled_from(sorted(STEPS)))
        network.lines.append(STEPS[kind].format(out=out, a=draw(pick), b=draw(pick)))
        if kind == "silu" and draw(st.booleans()):
            network.grids[f"{out}_g"] = grid(8, draw(st.sampled_from([1 / 255, 0.003])))
        # A part of a split is rounded by what the whole is rounded with: it has no grid of its own.
        name = f"{out}_c" if kind == "join" else out
        if draw(st.integers(0, 3)):
            network.grids[name] = draw(grids())
        network.names.append(out)
    return network


def extremes(seed):
    """Values on both sides of zero, and those around the minima of SiLU and HardSwish."""
    values = np.concatenate([np.linspace(-30, 30, 96), np.linspace(-2.5, 0, 160)])
    return np.random.default_rng(seed).permutation(values).astype(np.float32).reshape(SHAPE)


@given(network=networks(), seed=st.integers(0, 1000))
@settings(max_examples=200)
def test_codes_are_exact_and_a_claim_of_saturation_is_never_wrong(network, seed):
    model, quantized = network.model, network.quantized
    methods = low_bit_activations(model, quantized)
    if not network.grids:
        return
    codes, values = codes_and_values(model, quantized, extremes(seed), "values")
    for name, on_grid in network.grids.items():
        np.testing.assert_array_equal(codes[name], on_grid.quantize(values[name]))
        if methods.get(name) == "saturating":
            unclipped = np.rint(values[name] / on_grid.scale) + on_grid.zero_point
            assert unclipped.min() >= on_grid.spec.qmin
    others, _ = codes_and_values(model, quantized, extremes(seed), "codes")
    for name in network.grids:
        np.testing.assert_array_equal(codes[name], others[name])


@pytest.mark.parametrize("clip", ["codes", "values"])
@pytest.mark.parametrize("kind", ["LeakyRelu<alpha=1.0>", "Relu"])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_values_on_and_between_all_levels(bits, signed, kind, clip):
    """Far below, far above, on every level and at every tie, with the graph optimised too."""
    spec = QuantSpec(bits, signed=signed)
    for scale, zero_point in [(0.1, spec.qmin), (1.0, spec.qmin + 1), (1 / 3, 0), (0.7, spec.qmax)]:
        on_grid = QParams.of(spec, scale, zero_point)
        x = ((np.arange(-256, 256, 2) + np.arange(256) % 2) / 2).astype(np.float32).reshape(SHAPE) * on_grid.scale
        model, quantized = model_of(f"v = {kind}(x) y = Identity(v)"), quantized_of({"v": on_grid})
        expected = np.maximum(x, 0) if kind == "Relu" else x
        codes, _ = codes_and_values(model, quantized, x, clip)
        np.testing.assert_array_equal(codes["v"], on_grid.quantize(expected))
        found = run(insert_qdq(model, quantized, clip=clip), {"y": TensorProto.FLOAT}, x, optimise=True)
        np.testing.assert_array_equal(found["y"], on_grid.fake_quantize(expected))


# --- ReLU ---


def relu_network(zero_point, bits):
    """A convolution, ReLU and another convolution; nothing is rounded between a convolution and its ReLU."""
    generator = np.random.default_rng(0)
    layers = {
        name: QuantizedLayer(
            generator.integers(-8, 8, (4, 4, 3, 3)).astype(np.int8),
            QParams.of(QuantSpec(4, granularity="per_channel", axis=0), np.full(4, 0.03, np.float32)),
            generator.integers(-40, 40, 4).astype(np.int32),
            source,
        )
        for name, source in {"a": "images", "b": "v"}.items()
    }
    activations = {"images": grid(8, 1 / 255), "v": grid(bits, 0.1, zero_point), "b": grid(8, 0.1, 128)}
    conv = "Conv<pads=[1,1,1,1]>"
    body = f"a = {conv}(images, k) v = Relu(a) b = {conv}(v, k) y = Identity(b)"
    text = (
        '<ir_version: 8, opset_import: ["" : 18]> g (float[1,4,8,8] images) => (float y) '
        f"<float[4,4,3,3] k = {{{', '.join(['0.0'] * 144)}}}> {{ {body} }}"
    )
    return ir.from_proto(onnx.parser.parse_model(text)), QuantizedModel({}, layers, activations, {}, "w4a4")


@pytest.mark.parametrize(("bits", "zero_point"), [(8, 0), (8, 20), (4, 0), (4, 3), (2, 0)])
def test_relu_stays_in_integers(bits, zero_point, tmp_path):
    model, quantized = relu_network(zero_point, bits)
    x = np.random.default_rng(1).random(SHAPE).astype(np.float32)
    found = {}
    for clip in ("codes", "values"):
        qdq = insert_qdq(model, quantized, clip=clip)
        assert ("Relu" in [node.op_type for node in qdq.graph]) == (clip == "values" or (bits, zero_point) == (8, 0))
        found[clip] = run(qdq, {"y": TensorProto.FLOAT}, x)["y"]
        if clip == "codes":
            optimised = optimised_kinds(qdq, tmp_path / "optimised.onnx")
            assert optimised["QLinearConv"] == 2
            assert optimised["QuantizeLinear"] == 1 and optimised["Relu"] == optimised["FusedConv"] == 0
            fast = run(qdq, {"y": TensorProto.FLOAT}, x, optimise=True)["y"]
            np.testing.assert_allclose(fast, found["codes"], atol=0.1001)
            assert (fast != found["codes"]).mean() < 0.02
    np.testing.assert_array_equal(found["codes"], found["values"])
    assert len(np.unique(found["codes"])) > 5


def optimised_kinds(model, path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)
