"""Suppression inside the graph: the detections of our own decode, in both runtimes and for ultralytics."""

import ast

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import yaml
from helpers.engines import run

from qyolo_deploy.engines.base import open_engine
from qyolo_deploy.engines.openvino import build_openvino
from qyolo_deploy.errors import InputError
from qyolo_deploy.export.metadata import set_metadata, tell_nms
from qyolo_deploy.export.nms import suppress
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.recipe import ExportSection, NmsSection
from qyolo_deploy.validate.detections import decode

IOU, MAX_DET = 0.5, 40
METADATA = {
    "description": "-",
    "author": "-",
    "version": "1",
    "license": "-",
    "stride": 32,
    "task": "detect",
    "batch": 1,
    "imgsz": [64, 64],
    "names": dict(enumerate("abcdef")),
    "channels": 3,
    "end2end": False,
    "args": {"batch": 1, "dynamic": True, "nms": False},
}


@pytest.fixture(scope="module")
def full(float_model, quantized, images):
    """What the engine without suppression gives, and a threshold in a gap between scores that leaves dozens."""
    output = run(insert_qdq(float_model, quantized), images)
    levels = np.unique(output[:, 4:])[-200:]
    widest = np.diff(levels[:100]).argmax()
    return output, float(levels[widest : widest + 2].mean())


@pytest.fixture(scope="module")
def suppressed(float_model, quantized, full):
    model = suppress(float_model, full[1], IOU, MAX_DET)
    metadata = tell_nms(METADATA, NmsSection(conf=full[1], iou=IOU, max_det=MAX_DET))
    set_metadata(model, metadata)
    return insert_qdq(model, quantized), metadata


@pytest.fixture(scope="module")
def engines(suppressed, tmp_path_factory):
    folder, (model, metadata) = tmp_path_factory.mktemp("nms"), suppressed
    paths = {"onnxruntime": folder / "m.onnx", "openvino": folder / "m_openvino_model"}
    ir.save(model, paths["onnxruntime"])
    paths["openvino"].mkdir()
    build_openvino(paths["onnxruntime"], paths["openvino"], "m", metadata)
    return paths


def assert_same(ours, theirs, exactly):
    assert len(ours) == len(theirs)
    order = [np.lexsort((*found.boxes.T, found.classes)) for found in (ours, theirs)]
    compare = np.testing.assert_array_equal if exactly else lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 0.05)
    for key in ("boxes", "scores", "classes"):
        compare(getattr(ours, key)[order[0]], getattr(theirs, key)[order[1]])


def test_detections_are_those_of_our_own_decode(full, engines, images):
    """Of two images at once: each has its own detections, best first, and zeros behind them."""
    output, conf = full
    found = open_engine(engines["onnxruntime"])(images.numpy())
    assert found.shape == (2, MAX_DET, 6)
    for image in range(2):
        theirs = decode(output[image], conf, IOU, MAX_DET)
        assert len(theirs) > 5
        assert_same(decode(found[image], conf, 0.0, MAX_DET), theirs, exactly=True)
        assert (np.diff(found[image, :, 4]) <= 0).all() and not found[image, len(theirs) :].any()


def test_few_rows_hold_the_best(float_model, quantized, full, images):
    output, conf = full
    found = run(insert_qdq(suppress(float_model, conf, IOU, 3), quantized), images)
    for image in range(2):
        assert_same(decode(found[image], conf, 0.0, 3), decode(output[image], conf, IOU, 3), exactly=True)


def test_nothing_above_the_threshold_is_zeros(float_model, images):
    assert not run(suppress(float_model, 1.0, IOU, 5), images).any()


def test_both_runtimes_give_the_same(engines, images):
    one, other = (open_engine(engines[runtime])(images.numpy()) for runtime in ("onnxruntime", "openvino"))
    assert one.shape == other.shape
    assert abs(int((one[..., 4] > 0).sum()) - int((other[..., 4] > 0).sum())) <= 4  # some codes turn at ties
    np.testing.assert_allclose(one[:, 0, 4], other[:, 0, 4], atol=0.05)


def test_the_file_is_valid_and_tells_its_shape(suppressed):
    proto = ir.to_proto(suppressed[0])
    onnx.checker.check_model(proto, full_check=True)
    (output,) = proto.graph.output
    shape = [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim]
    assert (output.name, shape) == ("output0", ["batch", MAX_DET, 6])
    args = ast.literal_eval({entry.key: entry.value for entry in proto.metadata_props}["args"])
    assert args["nms"] is True and (args["iou"], args["max_det"]) == (IOU, MAX_DET)


def test_a_graph_that_ends_elsewhere_is_refused(suppressed, float_model):
    model = float_model.clone()
    model.graph.outputs[0].name = "other"
    with pytest.raises(InputError, match="no output 'output0'"):
        suppress(model, 0.1, IOU, 5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_ultralytics_takes_the_detections_as_they_are(engines, images, runtime):
    from qyolo_deploy.models.ultralytics_env import import_ultralytics

    import_ultralytics()
    from ultralytics.nn.autobackend import AutoBackend
    from ultralytics.utils.nms import non_max_suppression

    backend = AutoBackend(str(engines[runtime]), device=torch.device("cpu"))
    assert backend.end2end
    predictions = torch.as_tensor(np.asarray(backend(images[:1])))
    (found,) = non_max_suppression(predictions, 0.0, end2end=backend.end2end)
    expected = decode(open_engine(engines[runtime])(images[:1].numpy())[0], 0.0, 0.0, MAX_DET)
    if runtime == "onnxruntime":
        np.testing.assert_array_equal(found[:, :4].numpy(), expected.boxes)
        np.testing.assert_array_equal(found[:, 5].numpy(), expected.classes)
    else:  # of OpenVINO it takes the default precision
        assert abs(len(found) - len(expected)) <= 4


# --- recipe ---


def test_a_recipe_says_so_with_a_word_or_with_thresholds():
    assert ExportSection().nms is None and ExportSection(nms=False).nms is None
    assert ExportSection(nms=True).nms == NmsSection() == NmsSection(conf=0.001, iou=0.6, max_det=300)
    assert ExportSection.model_validate(yaml.safe_load("nms: {conf: 0.25}")).nms.conf == 0.25


def test_raw_heads_are_not_suppressed():
    with pytest.raises(ValueError, match="expected none with head raw"):
        ExportSection(nms=True, head="raw")
