"""Average precision from matches against COCOeval, and resampled images against the same dataset written out."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from qyolo_deploy.validate.bootstrap import METRICS, Bootstrap, mean_precision, with_interval
from qyolo_deploy.validate.coco_map import CocoMetrics, coco_map
from qyolo_deploy.validate.matches import match_classes
from qyolo_deploy.validate.report import EvalReport
from qyolo_deploy.validate.results import ResultTable


def scene(rng, images=24, levels=None):
    """Ground truth with crowds, sizes of all kinds and objects on top of each other, and detections to it."""
    annotations, results = [], []
    for image in range(images):
        for _ in range(rng.integers(0, 6)):
            size = np.exp(rng.uniform(np.log(8), np.log(250), 2))
            box = [float(v) for v in (*rng.uniform(0, 300, 2), *size)]
            crowd, category = int(rng.random() < 0.15), int(rng.choice([2, 5, 90]))
            for copy in range(1 + (rng.random() < 0.1)):  # equal boxes: the overlap is a tie
                entry = {"id": len(annotations) + 1, "image_id": image + 10, "category_id": category, "bbox": box}
                annotations.append({**entry, "area": box[2] * box[3] * (0.7 + copy / 10), "iscrowd": crowd})
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.normal(0, 0.06, 4) * np.tile(box[2:], 2)
                moved = moved if rng.random() < 0.9 else np.array(box)
                label = category if rng.random() < 0.85 else int(rng.choice([2, 5, 90, 91]))
                results.append({"image_id": image + 10, "category_id": label, "bbox": moved.tolist()})
    for result in results:
        score = float(rng.random())
        result["score"] = score if levels is None else round(score * levels) / levels
    truth = {
        "images": [{"id": i + 10, "width": 640, "height": 480} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in (2, 5, 90, 91)],
    }
    return truth, results


CATEGORIES = [2, 5, 90, 91]


def figures(classes, images):
    once = np.ones((1, images), np.int32)
    return {name: mean_precision(classes, once, *selection)[0] for name, selection in METRICS.items()}


@pytest.mark.parametrize(("seed", "levels"), [(0, None), (1, None), (2, 5), (3, 5)])
def test_images_as_they_are_give_what_cocoeval_gives(seed, levels):
    truth, results = scene(np.random.default_rng(seed), levels=levels)
    table, images = ResultTable.from_coco(results), [image["id"] for image in truth["images"]]
    expected = coco_map(truth, CATEGORIES, table, images, "pycocotools")
    classes = match_classes(truth, CATEGORIES, table, images)
    for name, value in figures(classes, len(images)).items():
        assert value == pytest.approx(getattr(expected, name), abs=1e-9), name
    for category, matches in zip(CATEGORIES, classes, strict=True):
        value = mean_precision([matches], np.ones((1, len(images)), np.int32))[0]
        assert (
            np.isnan(value)
            if category == 91
            else value == pytest.approx(expected.per_class[f"class {category}"], abs=1e-9)
        )


def written_out(truth, results, draw):
    """The dataset with each image as often as it was drawn."""
    new = {"images": [], "annotations": [], "categories": truth["categories"]}
    found = []
    for image, count in zip(truth["images"], draw, strict=True):
        for _ in range(count):
            number = len(new["images"]) + 1
            new["images"].append({**image, "id": number})
            for entry in truth["annotations"]:
                if entry["image_id"] == image["id"]:
                    new["annotations"].append({**entry, "image_id": number, "id": len(new["annotations"]) + 1})
            found += [{**result, "image_id": number} for result in results if result["image_id"] == image["id"]]
    return new, found


def test_resampled_images_give_what_cocoeval_gives_on_the_dataset_written_out():
    rng = np.random.default_rng(7)
    truth, results = scene(rng)
    images = [image["id"] for image in truth["images"]]
    classes = match_classes(truth, CATEGORIES, ResultTable.from_coco(results), images)
    draws = rng.multinomial(len(images), np.full(len(images), 1 / len(images)), 4).astype(np.int32)
    for index, draw in enumerate(draws):
        new, found = written_out(truth, results, draw)
        numbers = [image["id"] for image in new["images"]]
        expected = coco_map(new, CATEGORIES, ResultTable.from_coco(found), numbers)
        for name, selection in METRICS.items():
            value, other = mean_precision(classes, draws, *selection)[index], getattr(expected, name)
            assert np.isnan(value) if other is None else value == pytest.approx(other, abs=1e-9), name


def report_of(name, map50_95):
    metrics = CocoMetrics(map50_95, 0.5, 0.5, None, None, None, {})
    return EvalReport(name, metrics, 24, {}, 64, "rect", None, None, None, {})


def test_views_share_their_draws_and_a_view_does_not_differ_from_itself():
    truth, results = scene(np.random.default_rng(5))
    images = [image["id"] for image in truth["images"]]
    worse = [{**r, "score": r["score"] if i % 4 else r["score"] / 3} for i, r in enumerate(results)]
    views = []
    for found in (results, worse):
        matches = match_classes(truth, CATEGORIES, ResultTable.from_coco(found), images)
        views.append(Bootstrap(dict(zip(map(str, CATEGORIES), matches, strict=True)), len(images), 200))
    base, same, other = (report_of(name, value) for name, value in (("float", 0.5), ("same", 0.5), ("other", 0.25)))
    resampled = {"float": views[0], "same": views[0], "other": views[1]}
    assert with_interval(base, base, resampled).interval is None
    unmoved = with_interval(same, base, resampled).interval
    assert (unmoved.difference, unmoved.low, unmoved.high, unmoved.resamples) == (0, 0, 0, 200)
    paired = with_interval(other, base, resampled).interval
    first, second = (view.samples("map50_95") for view in views)
    assert (paired.relative_to, paired.difference) == ("float", -0.25)
    assert np.mean(second - first < paired.low) == pytest.approx(0.025, abs=0.005)
    assert np.mean(second - first > paired.high) == pytest.approx(0.025, abs=0.005)
    # Sharing the draws is what makes the difference known better than either figure.
    assert np.std(second - first) < 0.8 * min(np.std(first), np.std(second))
    np.testing.assert_array_equal(first, views[0].samples("map50_95"))
    assert views[0].samples("latency_ms.p50") is None and views[0].samples("per_class.bird") is None


def test_nothing_detected_is_zero_and_no_objects_are_undefined():
    truth, _ = scene(np.random.default_rng(6))
    images = [image["id"] for image in truth["images"]]
    classes = match_classes(truth, CATEGORIES, ResultTable.join([]), images)
    once = np.ones((2, len(images)), np.int32)
    assert mean_precision(classes, once).tolist() == [0, 0]
    assert np.isnan(mean_precision(classes[3:], once)).all()


def test_real_annotations_give_what_cocoeval_gives():
    if "QYOLO_DATA" not in os.environ:
        pytest.skip("QYOLO_DATA names no folder of real data")
    file = Path(os.environ["QYOLO_DATA"]) / "coco-subset/annotations/instances_val2017.json"
    truth = json.loads(file.read_text())
    rng = np.random.default_rng(1)
    results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": (np.array(a["bbox"]) + rng.normal(0, 0.08, 4) * np.tile(a["bbox"][2:], 2)).tolist(),
            "score": round(float(rng.random()), 2),
        }
        for a in truth["annotations"]
        for _ in range(rng.integers(0, 4))
    ]
    table, images = ResultTable.from_coco(results), [image["id"] for image in truth["images"]]
    categories = [category["id"] for category in truth["categories"]]
    expected = coco_map(truth, categories, table, images)
    for name, value in figures(match_classes(truth, categories, table, images), len(images)).items():
        assert value == pytest.approx(getattr(expected, name), abs=1e-9), name
