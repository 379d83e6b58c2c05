import copy
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from qyolo_deploy.errors import InputError
from qyolo_deploy.validate import coco_map as coco_map_module
from qyolo_deploy.validate.coco_map import CocoMetrics
from qyolo_deploy.validate.results import ResultTable

EVALUATORS = ["faster", "pycocotools"]


def coco_map(truth, category_ids, results, image_ids, evaluator="faster"):
    return coco_map_module.coco_map(truth, category_ids, ResultTable.from_coco(results), image_ids, evaluator)


def annotation(number, image, category, box, crowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": crowd,
    }


def truth_of(*annotations, images=(1, 2), categories=((3, "cat"), (17, "dog"))):
    return {
        "images": [{"id": i, "width": 640, "height": 480} for i in images],
        "annotations": list(annotations),
        "categories": [{"id": i, "name": name} for i, name in categories],
    }


def result(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def noisy_results(truth, rng):
    """Detections like a detector's: jitter, wrong classes, misses, duplicates, strays, tied scores."""
    categories = [c["id"] for c in truth["categories"]]
    results = []
    for a in truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            box = np.array(a["bbox"]) + rng.normal(0, 0.08, 4) * np.tile(a["bbox"][2:], 2)
            category = a["category_id"] if rng.random() < 0.8 else int(rng.choice(categories))
            results.append(result(a["image_id"], category, box.tolist(), round(float(rng.random()), 2)))
    for image in truth["images"]:
        for _ in range(rng.integers(0, 20)):
            box = [*rng.uniform(0, 400, 2), *rng.uniform(2, 200, 2)]
            category = int(rng.choice(categories))
            results.append(result(image["id"], category, [float(v) for v in box], float(rng.random()) / 3))
    return results


def synthetic_truth(rng):
    categories = tuple((int(i), f"class {i}") for i in (2, 5, 90, 91))
    annotations = []
    for image in range(10, 50):
        for _ in range(rng.integers(0, 8)):
            size = np.exp(rng.uniform(np.log(6), np.log(250), 2))
            box = [float(v) for v in (*rng.uniform(0, 300, 2), *size)]
            category = int(rng.choice([2, 5, 90]))
            crowd = int(rng.random() < 0.15)
            annotations.append(annotation(len(annotations) + 7, image, category, box, crowd))
    return truth_of(*annotations, images=range(10, 50), categories=categories)


def assert_same(a, b):
    for field in dataclasses.fields(CocoMetrics):
        assert getattr(a, field.name) == pytest.approx(getattr(b, field.name), abs=1e-9), field.name


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_average_precision_by_hand(evaluator):
    truth = truth_of(
        annotation(1, 1, 3, [10, 10, 20, 20]), annotation(2, 2, 3, [50, 50, 20, 20]), categories=((3, "cat"),)
    )
    # IoU of the last one is 18 / 20.
    results = [
        result(1, 3, [10, 10, 20, 20], 0.9),
        result(2, 3, [300, 300, 20, 20], 0.8),
        result(2, 3, [50, 50, 20, 18], 0.7),
    ]
    metrics = coco_map(truth, (3,), results, (1, 2), evaluator)
    # 101 recall levels: precision 1 up to recall 0.5, two thirds up to 1, which IoU 0.95 does not reach.
    full, half = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert metrics.map50 == pytest.approx(full, abs=1e-9)
    assert metrics.map75 == pytest.approx(full, abs=1e-9)
    assert metrics.map50_95 == pytest.approx((9 * full + half) / 10, abs=1e-9)
    assert metrics.map_small == metrics.map50_95
    assert metrics.map_medium is None
    assert metrics.map_large is None
    assert metrics.per_class == {"cat": metrics.map50_95}


def test_both_evaluators_agree_on_synthetic_detections():
    rng = np.random.default_rng(0)
    truth = synthetic_truth(rng)
    results = noisy_results(truth, rng)
    images = [i["id"] for i in truth["images"]][:-3]
    fast, reference = (coco_map(truth, (2, 5, 90, 91), results, images, e) for e in EVALUATORS)
    assert_same(fast, reference)
    assert 0.1 < reference.map50_95 < 0.95
    assert set(reference.per_class) == {"class 2", "class 5", "class 90"}


def test_both_evaluators_agree_on_real_annotations():
    if "QYOLO_DATA" not in os.environ:
        pytest.skip("QYOLO_DATA names no folder of real data")
    file = Path(os.environ["QYOLO_DATA"]) / "coco-subset/annotations/instances_val2017.json"
    truth = json.loads(file.read_text())
    results = noisy_results(truth, np.random.default_rng(1))
    images = [i["id"] for i in truth["images"]]
    categories = [c["id"] for c in truth["categories"]]
    fast, reference = (coco_map(truth, categories, results, images, e) for e in EVALUATORS)
    assert_same(fast, reference)
    assert 0.1 < reference.map50_95 < 0.95


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_classes_evaluated_in_groups_give_the_same(evaluator, monkeypatch):
    rng = np.random.default_rng(2)
    truth = synthetic_truth(rng)
    results = noisy_results(truth, rng)
    images = [i["id"] for i in truth["images"]]
    together = coco_map(truth, (91, 5, 2, 90), results, images, evaluator)
    monkeypatch.setattr(coco_map_module, "_GROUP", 1)
    assert coco_map(truth, (91, 5, 2, 90), results, images, evaluator) == together


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_no_detections_give_zero(evaluator):
    truth = truth_of(annotation(1, 1, 3, [10, 10, 50, 50]))
    metrics = coco_map(truth, (3, 17), [], (1, 2), evaluator)
    assert metrics == CocoMetrics(0.0, 0.0, 0.0, None, 0.0, None, {"cat": 0.0})


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_detection_on_a_crowd_is_no_false_positive(evaluator):
    truth = truth_of(annotation(1, 1, 3, [10, 10, 50, 50]), annotation(2, 1, 3, [200, 200, 200, 200], crowd=1))
    results = [result(1, 3, [10, 10, 50, 50], 0.5), result(1, 3, [210, 210, 60, 60], 0.9)]
    assert coco_map(truth, (3,), results, (1, 2), evaluator).map50_95 == pytest.approx(1)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_detection_on_an_image_without_objects_is_a_false_positive(evaluator):
    truth = truth_of(annotation(1, 1, 3, [10, 10, 50, 50]))
    results = [result(1, 3, [10, 10, 50, 50], 0.5), result(2, 3, [210, 210, 60, 60], 0.9)]
    assert coco_map(truth, (3,), results, (1, 2), evaluator).map50_95 == pytest.approx(0.5)
    assert coco_map(truth, (3,), results, (1,), evaluator).map50_95 == pytest.approx(1)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_annotation_with_id_zero_is_found(evaluator):
    truth = truth_of(annotation(0, 1, 3, [10, 10, 50, 50]))
    results = [result(1, 3, [10, 10, 50, 50], 0.5)]
    assert coco_map(truth, (3,), results, (1,), evaluator).map50_95 == pytest.approx(1)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_no_objects_are_refused(evaluator):
    truth = truth_of(annotation(1, 1, 3, [10, 10, 50, 50], crowd=1), annotation(2, 2, 3, [10, 10, 50, 50]))
    with pytest.raises(InputError, match="mAP is not defined"):
        coco_map(truth, (3,), [], (1,), evaluator)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_input_is_not_changed_and_nothing_is_printed(evaluator, capfd):
    truth = truth_of(annotation(1, 1, 3, [10, 10, 50, 50]))
    results = [result(1, 3, [10, 10, 50, 50], 0.5)]
    before = copy.deepcopy((truth, results))
    coco_map(truth, (3, 17), results, (1, 2), evaluator)
    assert (truth, results) == before
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("value", [float("nan"), -1.0, 31.1])
def test_metrics_refuse_what_is_no_fraction(value):
    with pytest.raises(ValueError, match="fraction"):
        CocoMetrics(0.5, 0.5, 0.5, None, None, value, {})
    with pytest.raises(ValueError, match="cat"):
        CocoMetrics(0.5, 0.5, 0.5, None, None, None, {"cat": value})
