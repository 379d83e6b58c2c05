from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from helpers.engines import assert_same_codes, optimised
from onnx import TensorProto, helper

from qyolo_deploy.engines.openvino import OpenVinoRunner, build_openvino
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.export.saturation import low_bit_activations
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.simulate import simulate


def freeze_in_few_bits(prepared):
    """Freezes a model some of whose ranges no longer hold the low end of SiLU, as training may leave them."""
    quantizers = [quantizer for quantizer in prepared.quantizers().values() if quantizer.spec.bits < 8]
    with torch.no_grad():
        for quantizer in quantizers[::2]:
            quantizer.scale.mul_(0.3)
            quantizer.offset.zero_()
    return freeze(prepared, {})


@pytest.fixture(scope="module", params=[4, 3], ids=["a4", "a3"])
def few_bits(request, pico, make_prepared, make_scheme):
    """`pico` with activations of few bits: the integers, and the tensors inside SiLU."""
    prepared = make_prepared(pico, make_scheme(4, request.param))
    return freeze_in_few_bits(prepared), prepared.placement.inner


@pytest.fixture(scope="module", params=[4, 3], ids=["a4", "a3"])
def official_few_bits(request, official, photographs, make_prepared, make_scheme):
    """The official yolov5n in few bits."""
    prepared = make_prepared(official[0], make_scheme(4, request.param), photographs)
    return freeze_in_few_bits(prepared), prepared.placement.inner


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_the_engine_has_the_codes_of_few_bits(float_model, pico, few_bits, images, storage):
    quantized, _ = few_bits
    methods = low_bit_activations(float_model, quantized)
    assert set(methods.values()) == {"saturating", "clip"}
    assert set(methods) == {name for name, grid in quantized.activations.items() if grid.spec.bits < 8}
    qdq, view = insert_qdq(float_model, quantized, storage=storage), simulate(pico, quantized)
    for image in images:
        assert_same_codes(qdq, quantized, view, image[None])


def test_the_engine_has_the_codes_of_few_bits_on_photographs(official, official_few_bits, photographs):
    (detector, _, model), (quantized, _) = official, official_few_bits
    assert set(low_bit_activations(model, quantized).values()) == {"saturating", "clip"}
    qdq, view = insert_qdq(model, quantized, storage="int4"), simulate(detector, quantized)
    for image in photographs:
        assert_same_codes(qdq, quantized, view, image[None])


def test_few_bits_run_in_integers(float_model, few_bits, tmp_path):
    quantized, _ = few_bits
    methods = low_bit_activations(float_model, quantized)
    kinds = Counter(node.op_type for node in optimised(insert_qdq(float_model, quantized), tmp_path).node)
    assert kinds["QLinearConv"] == len(quantized.layers) == 59
    assert kinds["QLinearSigmoid"] == kinds["QLinearMul"] == 53
    assert kinds["QLinearAdd"] == 4 and kinds["QLinearConcat"] == 13
    assert kinds["QuantizeLinear"] == 1 and kinds["Clip"] == Counter(methods.values())["clip"]


def test_a_saturating_network_is_that_of_eight_bits(float_model, pico, make_prepared, make_scheme, tmp_path):
    """Ranges that hold what SiLU and the sums can be need no node more."""
    prepared = make_prepared(pico, make_scheme(4, 4))
    with torch.no_grad():
        for quantizer in prepared.quantizers().values():
            if quantizer.spec.bits < 8:
                quantizer.offset.copy_(-4 * quantizer.scale.clamp_(min=0.2))
    quantized = freeze(prepared, {})
    assert set(low_bit_activations(float_model, quantized).values()) == {"saturating"}
    graph = optimised(insert_qdq(float_model, quantized), tmp_path)
    eight = optimised(insert_qdq(float_model, freeze(make_prepared(pico), {})), tmp_path)
    assert Counter(node.op_type for node in graph.node) == Counter(node.op_type for node in eight.node)


def test_tensors_of_one_grid_keep_one_zero_point(float_model, few_bits, make_prepared, pico):
    quantized, _ = few_bits
    groups = make_prepared(pico).placement.groups
    methods = low_bit_activations(float_model, quantized)
    proto = ir.to_proto(insert_qdq(float_model, quantized))
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    found = {}
    for name, grid in quantized.activations.items():
        zero_point = constants[f"{name}.zero_point"]
        assert zero_point.dtype == np.uint8
        assert zero_point == grid.zero_point + 255 - grid.spec.qmax
        found.setdefault(groups[name], set()).add((float(constants[f"{name}.scale"]), int(zero_point)))
    assert all(len(pairs) == 1 for pairs in found.values())
    used = {group: {methods[name] for name in methods if groups[name] == group} for group in found}
    assert {"saturating", "clip"} in used.values()  # some producers clip, and others of the same grid do not


# --- OpenVINO ---


def openvino_of(model, folder):
    folder.mkdir()
    ir.save(model, folder / "source.onnx")
    build_openvino(folder / "source.onnx", folder, "model", {})
    return OpenVinoRunner(folder / "model.xml")


def assert_openvino_near(engine, view, images, score_error, box_error):
    """Mean differences, those of boxes as a share of their spread."""
    with torch.no_grad():
        expected = view(images).numpy()
    output = np.concatenate([engine(image[None].numpy()) for image in images])
    assert np.abs(output[:, 4:] - expected[:, 4:]).mean() <= score_error
    assert np.abs(output[:, :4] - expected[:, :4]).mean() <= box_error * expected[:, :4].std()


@pytest.mark.parametrize(("leaves_out", "clip"), [(False, "codes"), (True, "values")])
def test_openvino_with_few_bits(float_model, pico, few_bits, images, leaves_out, clip, tmp_path):
    """With everything rounded, and without what is inside SiLU, where the view has to leave it out too."""
    quantized, inner = few_bits
    left_out = inner if leaves_out else frozenset()
    qdq = insert_qdq(float_model, quantized, leave_out=left_out, storage="int4", clip=clip)
    view = simulate(pico, quantized, left_out)
    assert_openvino_near(openvino_of(qdq, tmp_path / "engine"), view, images, 0.01, 0.03)


@pytest.mark.parametrize("clip", ["codes", "values"])
def test_openvino_with_few_bits_on_photographs(official, official_few_bits, photographs, clip, tmp_path):
    (detector, _, model), (quantized, inner) = official, official_few_bits
    qdq = insert_qdq(model, quantized, leave_out=inner, storage="int4", clip=clip)
    engine = openvino_of(qdq, tmp_path / "engine")
    assert_openvino_near(engine, simulate(detector, quantized, inner), photographs, 2e-4, 0.08)
    assert kinds_in_openvino(engine)["Convolution", True] == len(quantized.layers)


@pytest.mark.parametrize("clip", ["codes", "values"])
def test_openvino_keeps_every_tensor_on_its_grid(static_model, few_bits, images, clip, tmp_path):
    """What tolerances of the output might not show: below and above the grid, SiLU would go on."""
    quantized, inner = few_bits
    proto = ir.to_proto(insert_qdq(static_model, quantized, leave_out=inner, clip=clip))
    grids = {n: grid for n, grid in quantized.activations.items() if grid.spec.bits < 8}
    outputs = [helper.make_tensor_value_info(f"{name}.dequantized", TensorProto.FLOAT, None) for name in grids]
    proto.graph.output.extend(outputs)
    engine = openvino_of(ir.from_proto(proto), tmp_path / "engine")
    found = list(engine.outputs(images[1:, :, :64, :64].numpy()).values())[1:]
    ends = {"low": 0, "high": 0}
    for grid, values in zip(grids.values(), found, strict=True):
        low, high = grid.dequantize(np.array([grid.spec.qmin, grid.spec.qmax]))
        assert np.abs(values - grid.fake_quantize(values)).max() <= 1e-3 * grid.scale
        ends["low"] += values.min() < low + grid.scale / 2
        ends["high"] += values.max() > high - grid.scale / 2
    assert min(ends.values()) > 5  # so that something was clipped at all


def kinds_in_openvino(engine):
    """How often each kernel runs, and whether in integers."""
    described = [node.get_rt_info() for node in engine._compile().get_runtime_model().get_ops()]
    facts = [{key: info[key].astype(str) for key in ("layerType", "runtimePrecision")} for info in described]
    return Counter((fact["layerType"], fact["runtimePrecision"] in ("u8", "i8")) for fact in facts)
