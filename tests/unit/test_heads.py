import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
import yaml

from qyolo_deploy.engines.base import open_engine
from qyolo_deploy.engines.heads import Head, head_metadata
from qyolo_deploy.engines.openvino import build_openvino
from qyolo_deploy.errors import InputError
from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.export.heads import expose_heads
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.simulate import fold_float
from qyolo_deploy.models.decode import AnchorDecode, DflDecode
from qyolo_deploy.validate.detections import decode

ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]]


def anchor_maps(generator, classes=3, batch=2):
    return [torch.randn(batch, 3 * (5 + classes), h, w, generator=generator) * 3 for h, w in ((8, 6), (4, 3))]


def dfl_maps(generator, classes=3, bins=16, batch=2):
    sizes = ((8, 6), (4, 3))
    return [torch.randn(batch, c, h, w, generator=generator) * 3 for h, w in sizes for c in (4 * bins, classes)]


CASES = {
    "anchors": (AnchorDecode(ANCHORS, (8, 16)), anchor_maps),
    "distributions": (DflDecode(16, (8, 16)), dfl_maps),
    "distances": (DflDecode(1, (8, 16)), lambda generator, **k: dfl_maps(generator, bins=1, **k)),
}


@pytest.mark.parametrize("conf", [0.0, 0.001, 0.25, 0.6, 0.999])
@pytest.mark.parametrize("kind", CASES)
def test_candidates_are_those_of_the_full_decode_in_its_order(kind, conf):
    module, make = CASES[kind]
    maps = make(torch.Generator().manual_seed(1))
    head = Head.parse(head_metadata(module.describe()))
    found = head.decode([raw.numpy() for raw in maps], conf)
    everything = module(maps).numpy()
    for image in range(2):
        kept = everything[image][:, (everything[image, 4:] > conf).any(0)]
        columns = found[image][:, : kept.shape[1]]
        np.testing.assert_allclose(columns, kept, rtol=2e-5, atol=2e-5)
        assert not found[image][:, kept.shape[1] :].any()  # filled up


@pytest.mark.parametrize("kind", CASES)
def test_detections_are_the_same(kind):
    module, make = CASES[kind]
    maps = make(torch.Generator().manual_seed(2))
    head = Head.parse(head_metadata(module.describe()))
    lean, full = head.decode([raw.numpy() for raw in maps], 0.3), module(maps).numpy()
    for image in range(2):
        ours, theirs = (decode(output[image], 0.3, 0.6, 300) for output in (lean, full))
        assert len(ours) == len(theirs) > 3
        np.testing.assert_array_equal(ours.classes, theirs.classes)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_nothing_above_the_threshold_gives_empty_columns_that_are_no_end_to_end_head(kind):
    module, make = CASES[kind]
    maps = [raw.numpy() * 0 - 9 for raw in make(torch.Generator())]
    output = Head.parse(head_metadata(module.describe())).decode(maps, 0.5)
    assert output.shape == (2, 7, 8)
    assert not output.any()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"strides": []}',
        '{"strides": [8]}',
        '{"strides": [8], "bins": 16, "anchors": [[[1, 2]]]}',
        '{"strides": [8, 16], "anchors": [[[1, 2]]]}',
        '{"strides": [8], "anchors": 3}',
        '{"strides": ["x"], "bins": 1}',
    ],
)
def test_other_descriptions_are_refused(text):
    with pytest.raises(InputError, match="do not describe a head"):
        Head.parse(text)


# --- engines ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["yolov5", "pico"])
def exported(request, make_detector, pico, make_prepared):
    """A detector, its integers, its exported graph, and that which ends at the head maps."""
    detector = pico if request.param == "pico" else make_detector("yolov5", seed=3)
    view = fold_float(detector)
    model = export_float(view, 64, dynamic=True)
    return detector, freeze(make_prepared(detector), {}), model, expose_heads(model, view)


def save(model, runtime, folder):
    path = folder / ("model.onnx" if runtime == "onnxruntime" else "model_openvino_model")
    if runtime == "onnxruntime":
        ir.save(model, path)
        return path
    path.mkdir()
    ir.save(model, folder / "source.onnx")
    build_openvino(folder / "source.onnx", path, "model", dict(model.metadata_props))
    return path


def threshold_between(scores):
    """A threshold that a tenth of the candidates pass, in a gap between scores, so that rounding lifts none."""
    levels = np.unique(scores.max(axis=1))
    levels = levels[int(0.9 * len(levels)) :]
    widest = np.diff(levels).argmax()
    return float(levels[widest : widest + 2].mean())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_engine_that_ends_at_its_maps_detects_the_same(exported, runtime, images, tmp_path):
    _, quantized, model, exposed = exported
    paths = {}
    for name, graph in (("decoded", model), ("raw", exposed)):
        (tmp_path / name).mkdir()
        paths[name] = save(insert_qdq(graph, quantized), runtime, tmp_path / name)
    full = open_engine(paths["decoded"])(images.numpy())
    conf = threshold_between(full[:, 4:])
    lean = open_engine(paths["raw"], conf=conf)(images.numpy())
    assert lean.shape[2] < full.shape[2] / 2
    for image in range(len(images)):
        theirs, ours = (decode(output[image], conf, 0.6, 300) for output in (full, lean))
        assert len(ours) == len(theirs)
        np.testing.assert_allclose(np.sort(ours.scores), np.sort(theirs.scores), rtol=1e-4)


def test_the_graph_has_no_decode_left(exported):
    _, _, model, exposed = exported
    kinds = {node.op_type for node in exposed.graph}
    assert "Sigmoid" in {node.op_type for node in model.graph}
    assert not kinds & {"Exp", "Expand", "Range", "Softmax", "Transpose"}
    maps = len(exposed.graph.outputs)
    assert [value.name for value in exposed.graph.outputs] == [f"head{index}" for index in range(maps)]
    assert [value.name for value in model.graph.outputs] == ["output0"]


@pytest.mark.parametrize("text", ["{", '{"strides": [8, 16, 32, 64], "bins": 1}'])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_metadata_that_do_not_fit_are_refused(exported, runtime, tmp_path, text):
    *_, exposed = exported
    path = save(exposed, runtime, tmp_path)
    if runtime == "onnxruntime":
        exposed = ir.load(path)
        exposed.metadata_props["raw_head"] = text
        ir.save(exposed, path)
    else:
        (path / "metadata.yaml").write_text(yaml.safe_dump({"raw_head": text}))
    with pytest.raises(InputError, match="'raw_head'") as caught:
        open_engine(path)
    assert "model" in str(caught.value) and "\n" not in str(caught.value)


def test_the_metadata_are_json(exported):
    *_, exposed = exported
    assert set(json.loads(exposed.metadata_props["raw_head"])) in ({"strides", "anchors"}, {"strides", "bins"})


def test_what_ultralytics_calls_head_is_no_description(exported, tmp_path):
    _, _, model, _ = exported
    other = model.clone()
    other.metadata_props["head"] = "Detect"  # in every export of theirs
    engine = open_engine(save(other, "onnxruntime", tmp_path))
    assert engine(np.zeros((1, 3, 64, 64), np.float32)).shape[2] > 8
