import threading

import cv2
import numpy as np
import pytest

from qyolo_deploy.data.records import DetectionDataset, ImageRecord
from qyolo_deploy.errors import InputError
from qyolo_deploy.validate import evaluate as evaluate_module
from qyolo_deploy.validate.evaluate import EvalSettings, evaluate

SETTINGS = EvalSettings(imgsz=320, rect=True)
# Each image: its size (width, height), then the red and the blue box (x, y, width, height).
# 640 x 400 is halved, 320 x 200 padded only, 100 x 320 padded at the sides.
SCENES = {
    4: ((320, 200), (20, 30, 60, 80), (200, 50, 100, 120)),
    9: ((640, 400), (20, 30, 60, 80), (400, 100, 200, 240)),
    11: ((100, 320), (10, 20, 50, 60), (40, 200, 60, 120)),
}


def make_dataset(folder, names=("red", "blue"), scenes=SCENES, category_ids=(1, 7)):
    records, annotations = [], []
    for number, (size, *rectangles) in scenes.items():
        image = np.full((size[1], size[0], 3), 114, np.uint8)
        for (x, y, w, h), bgr, category in zip(rectangles, ((0, 0, 255), (255, 0, 0)), category_ids, strict=True):
            image[y : y + h, x : x + w] = bgr
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category, **box})
        path = folder / f"{number}.png"
        cv2.imwrite(str(path), image)
        records.append(ImageRecord(number, path, *size))
    truth = {
        "images": [{"id": r.image_id, "file_name": r.path.name, "width": r.width, "height": r.height} for r in records],
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in zip(category_ids, names, strict=False)],
    }
    return DetectionDataset(
        source=folder / "boxes.yaml",
        split="val",
        class_names=names,
        category_ids=category_ids[: len(names)],
        images=tuple(records),
        boxes=(),
        classes=(),
        ground_truth=truth,
        annotation_file=None,
    )


def find_colours(images):
    """A detector of pure red and pure blue: `[1, 4 + 2, 21]`."""
    output = np.zeros((1, 6, 21), np.float32)
    for label, channel in enumerate((0, 2)):
        others = [c for c in range(3) if c != channel]
        mask = (images[0, channel] > 0.9) & (images[0, others].max(axis=0) < 0.1)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        output[0, :4, label] = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        output[0, 4 + label, label] = 0.875
    return output


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith("evaluate")]


class Parallel:
    """A detector that takes several images at a time, and goes on only when two are there."""

    parallel = 3

    def __init__(self):
        self._meet, self.threads = threading.Barrier(2, timeout=20), set()

    def __call__(self, images):
        self.threads.add(threading.get_ident())
        self._meet.wait()
        return find_colours(images)


def test_a_parallel_detector_is_called_from_several_threads_and_results_keep_their_order(tmp_path):
    dataset = make_dataset(tmp_path, scenes=dict(zip(range(1, 25), (SCENES[4], SCENES[9]) * 12, strict=True)))
    runner = Parallel()
    metrics, results = evaluate(runner, dataset, SETTINGS)
    expected_metrics, expected = evaluate(find_colours, dataset, SETTINGS)
    assert results.to_coco() == expected.to_coco()
    assert metrics == expected_metrics
    assert 2 <= len(runner.threads) <= 3
    assert threading.get_ident() not in runner.threads


def test_other_detectors_are_called_from_one_thread(tmp_path):
    threads = set()
    evaluate(
        lambda images: (threads.add(threading.get_ident()), find_colours(images))[1], make_dataset(tmp_path), SETTINGS
    )
    assert threads == {threading.get_ident()}


def test_error_of_a_parallel_detector_ends_the_threads(tmp_path):
    class Broken:
        parallel = 2

        def __call__(self, images):
            raise RuntimeError("engine is gone")

    with pytest.raises(RuntimeError, match="engine is gone"):
        evaluate(Broken(), make_dataset(tmp_path), SETTINGS)
    assert reading_threads() == []


@pytest.mark.parametrize("rect", [True, False])
@pytest.mark.parametrize("evaluator", ["faster", "pycocotools"])
def test_boxes_come_back_where_they_are(tmp_path, rect, evaluator):
    dataset = make_dataset(tmp_path)
    metrics, results = evaluate(find_colours, dataset, EvalSettings(320, rect), evaluator=evaluator)
    assert metrics.map50_95 == pytest.approx(1)
    assert metrics.per_class == pytest.approx({"red": 1, "blue": 1})
    expected = [
        {"image_id": image, "category_id": category, "bbox": pytest.approx(box, abs=0.01), "score": 0.875}
        for image, (_, *boxes) in SCENES.items()
        for category, box in zip((1, 7), boxes, strict=True)
    ]
    assert results.to_coco() == expected


def test_settings_decide_the_input(tmp_path):
    shapes = []

    def runner(images):
        shapes.append(images.shape[2:])
        return find_colours(images)

    dataset = make_dataset(tmp_path)
    evaluate(runner, dataset, EvalSettings(320, rect=False))
    assert shapes == [(320, 320)] * 3
    shapes.clear()
    evaluate(runner, dataset, EvalSettings(320, rect=True, stride=64))
    assert all(side % 64 == 0 for shape in shapes for side in shape)
    assert shapes[0] == shapes[1] != shapes[2]


def test_progress_is_told(tmp_path):
    calls = []
    dataset = make_dataset(tmp_path)
    evaluate(find_colours, dataset, SETTINGS, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_detections_are_cut_at_the_borders_of_the_image(tmp_path):
    output = np.zeros((1, 6, 21), np.float32)
    output[0, :5, 0] = 160, 100, 1000, 1000, 0.5
    _, results = evaluate(lambda images: output, make_dataset(tmp_path), SETTINGS)
    assert results.boxes.tolist() == [[0, 0, *size] for size, *_ in SCENES.values()]


def test_end_to_end_output_is_evaluated(tmp_path):
    def runner(images):
        candidates = find_colours(images)[0]
        output = np.zeros((1, 300, 6), np.float32)
        for label in (0, 1):
            x, y, w, h = candidates[:4, label]
            output[0, label] = x - w / 2, y - h / 2, x + w / 2, y + h / 2, 0.9, label
        return output

    metrics, _ = evaluate(runner, make_dataset(tmp_path), SETTINGS)
    assert metrics.map50_95 == pytest.approx(1)


@pytest.mark.parametrize(
    ("shape", "last_class", "message"),
    [
        ((1, 84, 2100), 0, "has 80 classes, but .*boxes.yaml has 2"),
        ((1, 300, 6), 2, "has 3 classes, but .*boxes.yaml has 2"),
        ((6, 2100), 0, r"shape \[6, 2100\], expected \[1, 6, anchors\]"),
    ],
)
def test_output_of_another_detector_is_refused(tmp_path, shape, last_class, message):
    output = np.zeros(shape, np.float32)
    output[..., 0, -1] = last_class
    with pytest.raises(InputError, match=message):
        evaluate(lambda images: output, make_dataset(tmp_path), SETTINGS)


def test_nan_in_the_output_is_refused(tmp_path):
    output = np.full((1, 6, 21), np.nan, np.float32)
    with pytest.raises(InputError, match=r"4\.png contains NaN"):
        evaluate(lambda images: output, make_dataset(tmp_path), SETTINGS)


def test_corrupt_image_stops_the_evaluation(tmp_path):
    dataset = make_dataset(tmp_path)
    dataset.images[1].path.write_bytes(dataset.images[1].path.read_bytes()[:60])
    seen = []
    with pytest.raises(InputError, match=r"9\.png"):
        evaluate(lambda images: (seen.append(1), find_colours(images))[1], dataset, SETTINGS)
    assert len(seen) == 1
    assert reading_threads() == []


def test_error_of_the_runner_ends_the_reading(tmp_path):
    def runner(images):
        raise RuntimeError("engine is gone")

    with pytest.raises(RuntimeError, match="engine is gone"):
        evaluate(runner, make_dataset(tmp_path), SETTINGS)
    assert reading_threads() == []


def test_images_are_read_only_a_few_ahead(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path, scenes=dict.fromkeys(range(1, 31), SCENES[4]))
    read, run, ahead = [], [], []
    real = evaluate_module.read_image
    monkeypatch.setattr(evaluate_module, "read_image", lambda path: (read.append(path), real(path))[1])

    def runner(images):
        run.append(1)
        ahead.append(len(read) - len(run))
        return find_colours(images)

    evaluate(runner, dataset, SETTINGS)
    assert len(read) == 30
    assert max(ahead) <= 4
