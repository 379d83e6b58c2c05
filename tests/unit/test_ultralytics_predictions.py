"""Our evaluation beside one that shares nothing with it: ultralytics' `val(save_json=True)` through pycocotools."""

import contextlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.engines.base import open_engine
from qyolo_deploy.models.ultralytics_env import ensure_torchvision, import_ultralytics
from qyolo_deploy.validate.coco_map import coco_map
from qyolo_deploy.validate.evaluate import EvalSettings, evaluate
from qyolo_deploy.validate.results import ResultTable


@pytest.fixture(scope="module")
def scenes(tiny_build):
    return load_dataset(tiny_build.folder / "data" / "synthetic.yaml", "val")


@pytest.fixture(scope="module")
def engine(tiny_build):
    """The float one: in few bits scores tie, and each side then keeps another of two boxes."""
    return tiny_build.onnx.with_name("quickstart_fp32.onnx")


@pytest.fixture(scope="module")
def predictions(tiny_build, engine, scenes, tmp_path_factory):
    """What ultralytics detects with an ONNX of ours, with the ids of our dataset."""
    folder = tmp_path_factory.mktemp("val")
    data = shutil.copytree(tiny_build.folder / "data", folder / "data")  # it writes caches beside the labels
    module = import_ultralytics()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)  # put back as it was, whatever that was
        ensure_torchvision()
        module.YOLO(str(engine), task="detect").val(
            data=str(data / "synthetic.yaml"),
            **{"imgsz": 128, "rect": False, "batch": 1, "conf": 0.001, "iou": 0.6, "max_det": 300, "device": "cpu"},
            **{
                "plots": False,
                "verbose": False,
                "save_json": True,
                "project": str(folder),
                "name": "run",
                "workers": 0,
            },
        )
    (file,) = folder.rglob("predictions.json")
    ids = {record.path.name: record.image_id for record in scenes.images}
    found = json.loads(file.read_text())
    return [
        {
            "image_id": ids[entry["file_name"]],
            "category_id": scenes.category_ids[entry["category_id"] - 1],
            "bbox": entry["bbox"],
            "score": entry["score"],
        }
        for entry in found
    ]


@pytest.mark.parametrize("evaluator", ["faster", "pycocotools"])
def test_its_predictions_get_the_figures_that_pycocotools_gives_them(scenes, predictions, evaluator):
    truth = COCO()
    truth.dataset = json.loads(json.dumps(scenes.ground_truth))
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(predictions), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    image_ids = [record.image_id for record in scenes.images]
    ours = coco_map(scenes.ground_truth, scenes.category_ids, ResultTable.from_coco(predictions), image_ids, evaluator)
    for value, expected in zip((ours.map50_95, ours.map50, ours.map75), run.stats, strict=False):
        assert value == pytest.approx(expected, abs=1e-9)
    for value, expected in zip((ours.map_small, ours.map_medium, ours.map_large), run.stats[3:6], strict=True):
        assert (expected == -1) if value is None else value == pytest.approx(expected, abs=1e-9)
    assert ours.map50_95 > 0.05


def test_we_detect_what_it_detects(engine, scenes, predictions):
    _, results = evaluate(open_engine(engine), scenes, EvalSettings(128, rect=False))
    theirs = ResultTable.from_coco(predictions)
    assert len(theirs) > 100
    for image in scenes.images:
        for category in scenes.category_ids:
            one, other = (
                t.take((t.image_ids == image.image_id) & (t.category_ids == category) & (np.round(t.scores, 5) > 0.01))
                for t in (results, theirs)
            )
            assert len(one) == len(other)
            np.testing.assert_allclose(np.sort(one.scores), np.sort(other.scores), atol=1e-4)
            distances = np.abs(one.boxes[:, None] - other.boxes).max(axis=2)
            assert (distances.min(axis=1, initial=1e9) < 0.01).all()
