import os
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from helpers.engines import assert_same_codes, compare_codes, optimised, run, session_of, to_bytes
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.simulate import View, fold_float, simulate
from qyolo_deploy.models.registry import with_activation
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

FLOAT_TOLERANCE = 2e-3  # of the spread of the values; float32 in another order


def assert_near(ours, theirs):
    for part in (slice(0, 4), slice(4, None)):  # boxes in pixels, then scores
        assert np.abs(ours[:, part] - theirs[:, part]).max() < FLOAT_TOLERANCE * theirs[:, part].std()


def some_images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def anchor_model(make_detector):
    """A detector with anchors, exported with open shapes."""
    detector = make_detector("yolov5")
    return detector, export_float(fold_float(detector), 64, dynamic=True)


# --- float ---


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 3, 96, 160), (2, 3, 32, 128)], ids=str)
def test_open_shapes_take_other_batches_and_sizes_than_the_example(float_model, pico, shape):
    images = some_images(*shape)
    with torch.no_grad():
        assert_near(run(float_model, images), pico(images).numpy())


def test_maps_are_decoded_without_transposes(float_model, static_model, anchor_model):
    detector, anchors = anchor_model
    for model in (float_model, static_model, anchors):
        assert "Transpose" not in {node.op_type for node in model.graph}
    for shape in [(2, 3, 128, 160), (1, 3, 96, 64)]:
        images = some_images(*shape)
        with torch.no_grad():
            assert_near(run(anchors, images), detector(images).numpy())


def test_a_graph_that_took_a_size_for_a_constant_is_refused(pico):
    class Sized(nn.Module):
        def forward(self, maps):
            return maps[0].flatten(2) * float(maps[0].shape[3])

    view = View(fold_float(pico).core, Sized())
    with pytest.raises(InputError, match="does not compute what the network computes"):
        export_float(view, 64, dynamic=True)
    assert run(export_float(view, 64, dynamic=False), some_images(1, 3, 64, 64)).shape[2] == 64


def test_a_fixed_shape_computes_the_same_and_refuses_others(static_model, pico):
    images = some_images(1, 3, 64, 64)
    with torch.no_grad():
        assert_near(run(static_model, images), pico(images).numpy())
    for shape in [(2, 3, 64, 64), (1, 3, 96, 64)]:
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
            run(static_model, some_images(*shape))


def test_anchors_are_exported_too(anchor_model):
    detector, model = anchor_model
    for shape in [(1, 3, 64, 64), (2, 3, 128, 96)]:
        images = some_images(*shape)
        with torch.no_grad():
            assert_near(run(model, images), detector(images).numpy())


def test_inputs_outputs_and_opset(float_model, static_model):
    fixed, opened = (ir.to_proto(model) for model in (static_model, float_model))
    onnx.checker.check_model(fixed, full_check=True)
    onnx.checker.check_model(opened, full_check=True)
    for proto in (fixed, opened):
        assert [value.name for value in proto.graph.input] == ["images"]
        assert [value.name for value in proto.graph.output] == ["output0"]
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
        assert proto.ir_version == 8  # what that opset came with

    def shape(value):
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    assert shape(fixed.graph.input[0]) == [1, 3, 64, 64]
    assert shape(fixed.graph.output[0]) == [1, 10, 84]
    assert shape(opened.graph.input[0]) == ["batch", 3, "height", "width"]
    assert shape(opened.graph.output[0]) == ["batch", 10, "anchors"]


def test_every_tensor_of_the_network_has_its_name(float_model, static_model, pico):
    core = fold_float(pico).core
    expected = {str(node.target) for node in core.graph.nodes if node.op == "call_module"}
    for model in (float_model, static_model):
        producers = {value.name: node.op_type for node in model.graph for value in node.outputs}
        assert expected <= set(producers)
        kinds = Counter(producers[name] for name in expected)
        assert kinds["Conv"] == 59 and kinds["Sigmoid"] == kinds["Mul"] == 53 and kinds["MaxPool"] == 3
        assert sum(kinds.values()) == len(expected)
        assert set(kinds) == {"Conv", "Sigmoid", "Mul", "Add", "Concat", "MaxPool", "Resize"}


def test_named_tensors_hold_the_values_of_their_modules(static_model, pico):
    """A name on the wrong tensor would put the right scale in the wrong place."""
    view = fold_float(pico)
    seen, images = {}, some_images(1, 3, 64, 64)
    for node in view.core.graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            hook = lambda _, inputs, output, name=name: seen.update({name: output.numpy().copy()})  # noqa: E731
            view.core.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        view(images)
    proto = ir.to_proto(static_model)
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in seen)
    found = session_of(proto.SerializeToString()).run(list(seen), {"images": images.numpy()})
    for name, value in zip(seen, found, strict=True):
        assert np.abs(value - seen[name]).max() <= FLOAT_TOLERANCE * seen[name].std(), name


# --- Q/DQ ---


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_every_convolution_runs_in_integers(float_model, quantized, tmp_path, storage):
    graph = optimised(insert_qdq(float_model, quantized, storage=storage), tmp_path)
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["QLinearConv"] == len(quantized.layers) == 59
    assert not [kind for kind in kinds if kind in ("Conv", "FusedConv", "NhwcFusedConv", "ConvInteger")]
    assert kinds["QLinearSigmoid"] == kinds["QLinearMul"] == 53
    assert kinds["QLinearAdd"] == 4 and kinds["QLinearConcat"] == 13
    # One for the images; none within the network, where it would mean a detour through float.
    assert kinds["QuantizeLinear"] == 1


def test_the_official_network_runs_in_integers(official, make_prepared, make_scheme, photographs, tmp_path):
    """And with weights of 4 bits it is a file of at most 0.62 of that in 8 bits, with the same output."""
    detector, _, model = official
    quantized = freeze(make_prepared(detector, make_scheme(4), photographs), {})
    files = {storage: insert_qdq(model, quantized, storage=storage) for storage in ("int8", "int4")}
    kinds = Counter(node.op_type for node in optimised(files["int4"], tmp_path).node)
    assert kinds["QLinearConv"] == 60 and kinds["Conv"] == 0 and kinds["QuantizeLinear"] == 1
    size = {storage: len(to_bytes(file)) for storage, file in files.items()}
    assert size["int4"] <= 0.62 * size["int8"]
    np.testing.assert_array_equal(run(files["int4"], photographs[:1]), run(files["int8"], photographs[:1]))


def test_storage_in_4_bits_changes_the_file_and_nothing_else(float_model, quantized, images):
    eight, four = (insert_qdq(float_model, quantized, storage=storage) for storage in ("int8", "int4"))
    np.testing.assert_array_equal(run(four, images), run(eight, images))
    small = {name: layer for name, layer in quantized.layers.items() if layer.qparams.spec.bits == 4}
    saved = len(to_bytes(eight)) - len(to_bytes(four))
    half = sum(layer.weight.size for layer in small.values()) / 2
    assert half - 250 * len(small) < saved < half  # the casts take some of it back
    packed = {tensor.name: tensor for tensor in ir.to_proto(four).graph.initializer}
    for name, layer in quantized.layers.items():
        tensor = packed[f"{name}.weight_quantized"]
        assert tensor.data_type == (TensorProto.INT4 if name in small else TensorProto.INT8)
        assert tensor.HasField("raw_data")
        assert len(tensor.raw_data) == (-(-layer.weight.size // 2) if name in small else layer.weight.size)


def test_the_float_model_is_left_as_it_is(float_model, quantized):
    before = to_bytes(float_model)
    insert_qdq(float_model, quantized)
    assert to_bytes(float_model) == before


def test_integers_and_scales_in_the_file_are_those_of_the_model(float_model, quantized):
    proto = ir.to_proto(insert_qdq(float_model, quantized))
    onnx.checker.check_model(proto, full_check=True)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    producer = {name: node for node in proto.graph.node for name in node.output}
    for name, layer in quantized.layers.items():
        conv = producer[name]
        assert conv.op_type == "Conv"
        source, weight, bias = (producer[value] for value in conv.input)
        assert source.op_type == weight.op_type == bias.op_type == "DequantizeLinear"
        np.testing.assert_array_equal(constants[weight.input[0]], layer.weight)
        np.testing.assert_array_equal(constants[weight.input[1]], layer.qparams.scale)
        np.testing.assert_array_equal(constants[bias.input[0]], layer.bias)
        np.testing.assert_array_equal(constants[bias.input[1]], quantized.bias_scale(name))
        assert constants[bias.input[0]].dtype == np.int32
        assert constants[source.input[1]] == quantized.activations[layer.input].scale
        assert constants[source.input[2]] == quantized.activations[layer.input].zero_point
    floats = [
        name for name, value in constants.items() if value.dtype == np.float32 and value.ndim == 4 and value.size > 16
    ]
    assert floats == []  # no float weights are left behind


def test_tensors_that_a_target_leaves_out_are_not_quantized(float_model, quantized, pico, make_prepared):
    inner = make_prepared(pico).placement.inner
    proto = ir.to_proto(insert_qdq(float_model, quantized, leave_out=inner))
    rounded = {node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    assert inner and not rounded & inner
    assert set(quantized.activations) - inner <= rounded


def test_parts_of_a_split_are_quantized_again(static_model, quantized):
    proto = ir.to_proto(insert_qdq(static_model, quantized))
    parts = [name for node in proto.graph.node if node.op_type == "Split" for name in node.output]
    readers = {name: [n.op_type for n in proto.graph.node if name in n.input] for name in parts}
    splits_of_the_core = [kinds for kinds in readers.values() if "QuantizeLinear" in kinds]
    assert len(splits_of_the_core) == 16
    assert all(kinds == ["QuantizeLinear"] for kinds in splits_of_the_core)


def test_a_network_of_another_kind_is_refused(quantized, anchor_model):
    with pytest.raises(InputError, match="no tensor 'model"):
        insert_qdq(anchor_model[1], quantized)


# --- parity of the integers ---


@pytest.mark.parametrize("bits", [4, 8])
def test_the_engine_has_the_codes_of_the_simulation(static_model, pico, make_prepared, make_scheme, bits):
    quantized = freeze(make_prepared(pico, make_scheme(bits)), {})
    qdq, view = insert_qdq(static_model, quantized), simulate(pico, quantized)
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        images = torch.rand(1, 3, 64, 64, generator=generator) ** (number + 1)
        assert_same_codes(qdq, quantized, view, images)


def test_the_engine_has_the_codes_of_the_simulation_on_photographs(official, photographs):
    detector, quantized, model = official
    qdq, view = insert_qdq(model, quantized), simulate(detector, quantized)
    for image in photographs:
        assert_same_codes(qdq, quantized, view, image[None])


@pytest.fixture(scope="module")
def relu(pico):
    """`pico` with ReLU instead of SiLU, and its float graph."""
    detector = with_activation(pico, "relu")
    return detector, export_float(fold_float(detector), 64, dynamic=False)


@pytest.mark.parametrize(("bits", "activations"), [(4, 4), (8, 8)])
def test_a_network_of_relu_runs_in_integers_as_simulated(relu, make_prepared, tmp_path, bits, activations):
    """Convolution and ReLU are one kernel, which clips at 0 by itself."""
    detector, model = relu
    scheme = QuantScheme(QuantSpec(bits), QuantSpec(activations, signed=False))
    quantized = freeze(make_prepared(detector, scheme), {})
    qdq, view = insert_qdq(model, quantized), simulate(detector, quantized)
    for number in range(2):
        share, *_ = compare_codes(qdq, quantized, view, some_images(1, 3, 64, 64) ** (number + 1))
        assert share == 0
    kinds = Counter(node.op_type for node in optimised(qdq, tmp_path).node)
    assert kinds["QLinearConv"] == 59 and kinds["Conv"] == 0 and kinds["Relu"] == 0
    assert kinds["QuantizeLinear"] == 1


# --- the same bytes again ---

_EXPORT_AGAIN = """
import sys
from pathlib import Path
import onnx_ir as ir
from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.graph.simulate import fold_float
from qyolo_deploy.models.base import ModelSpec
from qyolo_deploy.models.registry import build_detector
from qyolo_deploy.quant.model import QuantizedModel
from safetensors.torch import load_file
quantized = QuantizedModel.load(Path(sys.argv[1]))
detector = build_detector(ModelSpec.from_json(quantized.architecture))
detector.core.load_state_dict(load_file(sys.argv[2]))
model = export_float(fold_float(detector.eval()), 64, dynamic=False)
ir.save(model, sys.argv[3])
ir.save(insert_qdq(model, quantized), sys.argv[4])
"""


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(static_model, quantized, pico, repository, tmp_path):
    files = [str(tmp_path / name) for name in ("model.safetensors", "float.safetensors", "float.onnx", "qdq.onnx")]
    quantized.save(tmp_path / "model.safetensors")
    save_file(pico.core.state_dict(), files[1])
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONHASHSEED": "4321"}
    command = [sys.executable, "-c", _EXPORT_AGAIN, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    loaded = QuantizedModel.load(tmp_path / "model.safetensors")
    ir.save(static_model, tmp_path / "a.onnx")
    ir.save(insert_qdq(static_model, loaded), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "float.onnx").read_bytes()
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "qdq.onnx").read_bytes()
