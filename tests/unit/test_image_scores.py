"""Matches on single images and curves of classes, against counts by hand and against pycocotools."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from qyolo_deploy.data.records import DetectionDataset, ImageRecord
from qyolo_deploy.validate.bootstrap import bootstrap
from qyolo_deploy.validate.curves import precision_recall
from qyolo_deploy.validate.image_scores import match_images, worst_losses
from qyolo_deploy.validate.results import ResultTable

IDS = (3, 7)  # category ids need not be contiguous


def make_dataset(annotations, images=1):
    found = [
        {"id": n, "area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0, "category_id": 3, "image_id": 1, **a}
        for n, a in enumerate(annotations)  # from 0, which evaluations must not take for "none"
    ]
    truth = {
        "images": [{"id": n, "width": 100, "height": 100, "file_name": f"{n}.jpg"} for n in range(1, images + 1)],
        "annotations": found,
        "categories": [{"id": i, "name": name} for i, name in zip(IDS, ("cat", "dog"), strict=True)],
    }
    records = tuple(ImageRecord(n, Path(f"{n}.jpg"), 100, 100) for n in range(1, images + 1))
    return DetectionDataset(Path("x"), "val", ("cat", "dog"), IDS, records, (), (), truth, None)


def detection(box, score=0.9, category=3, image=1):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def counts(match):
    return len(match.right), len(match.wrong), len(match.missed)


@pytest.mark.parametrize(
    ("annotations", "found", "expected", "score"),
    [
        ([], [], (0, 0, 0), 1.0),
        ([], [detection([0, 0, 10, 10])], (0, 1, 0), 0.0),
        ([{"bbox": [0, 0, 10, 10]}], [], (0, 0, 1), 0.0),
        ([{"bbox": [0, 0, 10, 10]}], [detection([0, 0, 10, 10])], (1, 0, 0), 1.0),
        # Exactly half of the union: right. A pixel less: wrong, and the object is missed.
        ([{"bbox": [0, 0, 10, 10]}], [detection([0, 0, 10, 5])], (1, 0, 0), 1.0),
        ([{"bbox": [0, 0, 10, 10]}], [detection([0, 0, 10, 4.9])], (0, 1, 1), 0.0),
        # Another class, too little confidence, a second hit on the same object.
        ([{"bbox": [0, 0, 10, 10]}], [detection([0, 0, 10, 10], category=7)], (0, 1, 1), 0.0),
        ([{"bbox": [0, 0, 10, 10]}], [detection([0, 0, 10, 10], 0.2499)], (0, 0, 1), 0.0),
        ([{"bbox": [0, 0, 10, 10]}], [detection([0, 0, 10, 10]), detection([0, 0, 10, 9], 0.8)], (1, 1, 0), 2 / 3),
        # In a crowd region nothing counts.
        ([{"bbox": [0, 0, 50, 50], "iscrowd": 1}], [detection([10, 10, 5, 5])], (0, 0, 0), 1.0),
        ([{"bbox": [0, 0, 50, 50], "iscrowd": 1}], [detection([10, 10, 5, 5], category=7)], (0, 1, 0), 0.0),
    ],
)
def test_detections_are_matched_as_one_would_by_hand(annotations, found, expected, score):
    (match,) = match_images(make_dataset(annotations), ResultTable.from_coco(found))
    assert counts(match) == expected
    assert match.score == pytest.approx(score)


def test_the_surest_detection_has_the_first_choice_and_the_next_takes_what_is_left():
    objects = [{"bbox": [0, 0, 10, 10]}, {"bbox": [0, 4, 10, 10]}]
    found = [detection([0, 1, 10, 10], 0.5), detection([0, 0, 10, 10], 0.9)]  # the order in the list does not matter
    (match,) = match_images(make_dataset(objects), ResultTable.from_coco(found))
    assert counts(match) == (2, 0, 0)
    assert [result["score"] for result in match.right] == [0.9, 0.5]


def test_images_are_ranked_by_what_the_worst_view_loses():
    annotations = [{"bbox": [0, 0, 10, 10], "image_id": n} for n in (1, 2, 2, 3)]
    annotations[2] |= {"bbox": [50, 50, 10, 10]}
    dataset = make_dataset(annotations, images=3)
    everything = [detection(a["bbox"], image=a["image_id"]) for a in annotations]
    full = match_images(dataset, ResultTable.from_coco(everything))
    without_second = match_images(dataset, ResultTable.from_coco(everything[:1] + everything[3:]))
    without_one_of_second = match_images(dataset, ResultTable.from_coco(everything[:2] + everything[3:]))
    without_third = match_images(dataset, ResultTable.from_coco(everything[:3]))
    # Nothing is left of images 2 and 3: the one that loses two objects comes first.
    assert worst_losses(full, [without_second, without_third], 3) == [1, 2, 0]
    assert worst_losses(full, [without_one_of_second, without_third], 2) == [2, 1]
    assert worst_losses(full, [full], 1) == [0]


@pytest.fixture(scope="module")
def noisy():
    """Forty images with objects, crowds, and detections that hit some of them, by chance."""
    generator = np.random.default_rng(3)
    annotations, found = [], []
    for image in range(1, 41):
        for _ in range(generator.integers(0, 5)):
            box = [*generator.uniform(0, 60, 2), *generator.uniform(8, 40, 2)]
            category = int(generator.choice(IDS))
            crowd = int(generator.random() < 0.1)
            annotations.append({"bbox": box, "image_id": image, "category_id": category, "iscrowd": crowd})
            for _ in range(generator.integers(0, 3)):
                moved = (np.array(box) + generator.normal(0, 3, 4)).clip(1).tolist()
                found.append(detection(moved, float(generator.random()), category, image))
    return make_dataset(annotations, images=40), found


def pycocotools_run(dataset, found):
    """The reference's evaluation, before it is run."""
    truth = COCO()
    annotations = [{**a, "id": a["id"] + 1} for a in dataset.ground_truth["annotations"]]
    truth.dataset = {**dataset.ground_truth, "annotations": annotations}
    truth.createIndex()
    return COCOeval(truth, truth.loadRes([dict(result) for result in found]), "bbox")


def test_curves_are_those_of_pycocotools(noisy):
    dataset, found = noisy
    views = {"float": ResultTable.from_coco(found), "nothing": ResultTable.from_coco([])}
    curves = precision_recall({view: bootstrap(dataset, results).classes for view, results in views.items()})
    with contextlib.redirect_stdout(io.StringIO()):
        run = pycocotools_run(dataset, found)
        run.evaluate()
        run.accumulate()
    reference = run.eval["precision"][0, ::2, :, 0, 2]  # IoU 0.5, every second recall, all sizes, 100 detections
    assert curves["recall"] == pytest.approx(run.params.recThrs[::2])
    assert 0.2 < reference.mean() < 0.95
    for place, name in enumerate(("cat", "dog")):
        assert curves["views"]["float"]["per_class"][name] == pytest.approx(reference[:, place], abs=5.1e-5)
    assert curves["views"]["float"]["mean"] == pytest.approx(reference.mean(axis=1), abs=5.1e-5)
    assert set(curves["views"]["nothing"]["mean"]) == {0.0}


def test_matches_agree_with_pycocotools(noisy):
    dataset, found = noisy
    matches = match_images(dataset, ResultTable.from_coco(found), conf=0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        run = pycocotools_run(dataset, found)
        run.params.iouThrs = np.array([0.5])
        run.evaluate()
    expected = dict.fromkeys(range(1, 41), (0, 0))
    for entry in run.evalImgs:
        if entry is not None and entry["aRng"] == run.params.areaRng[0]:
            counted = ~entry["dtIgnore"][0].astype(bool)
            hits = int((entry["dtMatches"][0][counted] > 0).sum())
            right, wrong = expected[entry["image_id"]]
            expected[entry["image_id"]] = right + hits, wrong + int(counted.sum()) - hits
    assert {n: counts(match)[:2] for n, match in enumerate(matches, 1)} == expected
