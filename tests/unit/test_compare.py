"""Two views of one model tensor by tensor: the numbers, the order, and the layer that departs."""

import csv
import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qyolo_deploy.engines.openvino import build_openvino
from qyolo_deploy.errors import InputError
from qyolo_deploy.export.openvino_passes import ir_passes
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.graph.trace import trace
from qyolo_deploy.stages.compare import compare_sources, conclusions, parity_table, write_parity
from qyolo_deploy.stages.compare_views import open_view
from qyolo_deploy.stages.tensors_onnx import OnnxTensors
from qyolo_deploy.stages.tensors_openvino import OpenVinoTensors
from qyolo_deploy.stages.tensors_torch import float_tensors, grid_of, quantized_tensors
from qyolo_deploy.validate.parity import EXACT_DB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("views")


@pytest.fixture(scope="module")
def files(folder, float_model, quantized):
    """Float and quantized ONNX, and an OpenVINO model with the passes of a build."""
    qdq = insert_qdq(float_model, quantized, storage="int4")
    ir.save(float_model, folder / "fp32.onnx")
    ir.save(qdq, folder / "w4a8.onnx")
    openvino = folder / "w4a8_openvino_model"
    openvino.mkdir()
    ir.save(insert_qdq(float_model, quantized, clip="values"), folder / "source.onnx")
    build_openvino(folder / "source.onnx", openvino, "model", {}, ir_passes(quantized, "int4"))
    return {"float": folder / "fp32.onnx", "onnx": folder / "w4a8.onnx", "openvino": openvino}


@pytest.fixture(scope="module")
def batches(images):
    return [images[:1].numpy(), images[1:].numpy()]


def compared(left, right, batches, **others):
    return compare_sources(left, right, batches, len(batches), **others)


def test_onnxruntime_has_the_codes_of_the_fake_quantized_model(files, quantized, batches, pico):
    found = compared(quantized_tensors("view", quantized), OnnxTensors("onnx", files["onnx"]), batches)
    assert found.first_departure is None and found.both_quantized
    assert {layer.name for layer in found.layers} == set(quantized.activations)
    assert all(layer.sqnr_db == EXACT_DB and layer.differing == 0 for layer in found.layers)
    assert found.intact_db == {"view": EXACT_DB, "onnx": EXACT_DB}
    assert found.only == {"view": (), "onnx": ()}
    assert found.summary() == {"images": 2, "min_sqnr_db": EXACT_DB, "differing": 0.0}
    assert conclusions(found)[1] == "no tensor departs: all codes are the same"
    # In the order in which the network computes them.
    order = ["images", *(str(node.target) for node in trace(pico.core).graph.nodes if node.op == "call_module")]
    names = [layer.name for layer in found.layers]
    assert names == sorted(names, key=order.index)


@pytest.mark.parametrize("index", [0, 20, -1])
def test_the_layer_that_is_another_one_is_named(index, files, float_model, quantized, batches, tmp_path):
    name = list(quantized.layers)[index]
    weight = quantized.layers[name].weight.copy()
    weight[0] = np.where(weight[0] > 0, weight[0] - 1, weight[0] + 1)
    layers = {**quantized.layers, name: replace(quantized.layers[name], weight=weight)}
    ir.save(insert_qdq(float_model, replace(quantized, layers=layers)), tmp_path / "other.onnx")
    sources = OnnxTensors("one", files["onnx"]), OnnxTensors("other", tmp_path / "other.onnx")
    found = compared(*sources, batches)
    assert found.first_departure.name == name
    assert 0 < found.first_departure.differing <= 1 / len(weight)  # one channel of them
    marked = [row[1] for row in parity_table(found)[1] if row[0] == ">"]
    assert marked == [name]
    assert conclusions(found)[1].startswith(f"first departure: {name}, the first tensor whose codes differ")


def test_the_numbers_are_those_of_the_tensors(files, quantized, pico, batches):
    """Against sums over all values at once, of tensors that ONNX Runtime gives in float."""
    left, right = float_tensors("float", pico), OnnxTensors("onnx", files["onnx"])
    found = {layer.name: layer for layer in compared(left, right, batches).layers}
    names = list(found)[::20]
    ours = OnnxTensors("float", files["float"]).watch(names)
    theirs = OnnxTensors("again", files["onnx"]).watch(names)
    for name in names:
        grid = quantized.activations[name]
        wanted, value = (np.concatenate([watch(batch)[name].ravel() for batch in batches]) for watch in (ours, theirs))
        wanted, value = wanted.astype(np.float64), value.astype(np.float64)
        noise = ((wanted - value) ** 2).sum()
        assert found[name].sqnr_db == pytest.approx(10 * np.log10((wanted**2).sum() / noise), abs=1e-2)
        assert found[name].max_error == pytest.approx(np.abs(wanted - value).max(), rel=1e-4, abs=1e-5)
        assert found[name].max_error_steps == pytest.approx(found[name].max_error / float(grid.scale))
        flips = np.mean(grid.quantize(wanted.astype(np.float32)) != grid.quantize(value.astype(np.float32)))
        assert found[name].differing == pytest.approx(flips, abs=1e-4)


def test_float_views_agree_in_every_tensor(files, pico, batches):
    found = compared(float_tensors("torch", pico), OnnxTensors("onnx", files["float"]), batches)
    assert len(found.layers) > 150 and not found.both_quantized
    assert min(layer.sqnr_db for layer in found.layers) > 90
    assert all(layer.differing is None and layer.max_error_steps is None for layer in found.layers)
    assert found.first_departure is None
    assert "differing" not in found.summary()


def test_openvino_is_seen_with_the_grids_that_it_was_given(files, quantized, batches):
    source = OpenVinoTensors("openvino", files["openvino"])
    for name, grid in source.grids.items():
        expected = grid_of(quantized.activations[name])
        assert grid.is_like(expected) and (grid.low, grid.high) == (expected.low, expected.high), name
    found = compared(quantized_tensors("view", quantized), source, batches)
    names = [layer.name for layer in found.layers]
    assert names == [name for name in quantized_tensors("view", quantized).names if name in names]
    assert {"model.0.conv", "model.22.cv2.0.2", "model.22.cv3.2.2"} <= set(names)
    assert found.layers[0].sqnr_db == EXACT_DB and found.layers[0].name == "images"
    # Of what this network computes first, no more than single codes at a tie differ.
    assert all(layer.differing < 1e-3 and layer.max_error_steps < 1.5 for layer in found.layers[:4])
    # What only chooses among values is rounded before it, and has no name any more.
    assert set(found.only["view"]) == set(quantized.activations) - set(names)
    assert found.only["openvino"] == ()


def test_layers_that_stay_float_are_seen_too(float_model, pico, make_prepared, make_scheme, batches, tmp_path):
    from qyolo_deploy.graph.freeze import freeze

    kept = "model.22.cv2.0.2"
    quantized = freeze(make_prepared(pico, make_scheme(8, keep_float=(kept,))), {})
    ir.save(insert_qdq(float_model, quantized), tmp_path / "kept.onnx")
    found = compared(quantized_tensors("view", quantized), OnnxTensors("onnx", tmp_path / "kept.onnx"), batches)
    (layer,) = [layer for layer in found.layers if layer.name == kept]
    assert layer.differing is None and layer.sqnr_db > 100


def test_files_hold_all_numbers(files, quantized, pico, batches, tmp_path):
    found = compared(float_tensors("float", pico), quantized_tensors("view", quantized), batches)
    for suffix in ("json", "csv"):
        write_parity(found, tmp_path / f"parity.{suffix}")
    data = json.loads((tmp_path / "parity.json").read_text())
    assert data == json.loads(json.dumps(found.to_json()))
    rows = list(csv.DictReader((tmp_path / "parity.csv").open()))
    assert [row["name"] for row in rows] == [layer["name"] for layer in data["layers"]]
    assert [float(row["sqnr_db"]) for row in rows] == [layer["sqnr_db"] for layer in data["layers"]]
    with pytest.raises(InputError, match=r"expected a file that ends in \.csv or \.json"):
        write_parity(found, tmp_path / "parity.txt")


def test_views_without_a_common_tensor_are_refused(files, batches, tmp_path):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 64, 96]) for name in ("images", "a.b")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["a.b"])], "other", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "other.onnx")
    with pytest.raises(InputError, match="other and onnx have no tensor in common"):
        compared(OnnxTensors("other", tmp_path / "other.onnx"), OnnxTensors("onnx", files["onnx"]), batches)


def test_views_of_different_widths_are_refused(quantized, make_detector, batches):
    other = float_tensors("other", make_detector("yolov5"))
    with pytest.raises(InputError, match="expected two views of one model"):
        compared(quantized_tensors("view", quantized), other, batches)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing.onnx", "no such file"),
        ("w4a8.onnx@bf16", "only build folders and OpenVINO models"),
        ("w4a8_openvino_model@int8", "expected one of f32, bf16, f16"),
        ("source.txt", "expected an .onnx"),
        ("broken.safetensors", "not a readable safetensors file"),
    ],
)
def test_what_is_no_view_is_refused(text, message, files, folder):
    (folder / "source.txt").write_text("hello")
    (folder / "broken.safetensors").write_text("hello")
    with pytest.raises(InputError, match=message):
        open_view(str(folder / text))


def test_views_are_found_by_their_files(files, folder, quantized):
    quantized.save(folder / "model.safetensors")
    assert isinstance(open_view(str(files["onnx"])), OnnxTensors)
    assert isinstance(open_view(f"{files['openvino']}@bf16"), OpenVinoTensors)
    assert set(open_view(str(folder / "model.safetensors")).grids) == set(quantized.activations)
