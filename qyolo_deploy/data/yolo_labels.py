"""YOLO label files: one text file an image, one line an object, lengths as fractions of the image."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.data.images import read_size
from qyolo_deploy.data.records import Annotations, ImageRecord
from qyolo_deploy.errors import InputError

# Labels rounded to few digits reach a little over the border; ultralytics allows as much.
_SLACK = 0.01


def read_yolo_labels(paths: Sequence[Path], class_names: tuple[str, ...]) -> Annotations:
    """Read the labels beside `paths` and make COCO ground truth of them.

    Images are numbered from 0 in the given order, categories from 1 in the order of the classes. An image
    without a label file has no objects.

    Raises:
        InputError: A label line is malformed or names no class; an image is missing or corrupt.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        sizes = list(pool.map(read_size, paths))
    images = tuple(ImageRecord(index, path, *size) for index, (path, size) in enumerate(zip(paths, sizes, strict=True)))
    boxes, classes = [], []
    for image in images:
        image_classes, xyxy = read_label_file(label_path(image.path), len(class_names))
        pixels = xyxy * np.array([image.width, image.height] * 2)
        keep = (pixels[:, 2] > pixels[:, 0]) & (pixels[:, 3] > pixels[:, 1])
        boxes.append(pixels[keep].astype(np.float32))
        classes.append(image_classes[keep])
    category_ids = tuple(range(1, len(class_names) + 1))
    truth = _ground_truth(images, boxes, classes, class_names)
    return Annotations(class_names, category_ids, images, tuple(boxes), tuple(classes), truth)


def label_path(image: Path) -> Path:
    """Where the labels of an image are: the last folder `images` of its path becomes `labels`."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def read_label_file(path: Path, class_count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Read one label file.

    A line is `class x y w h` (centre and size) or `class x1 y1 x2 y2 x3 y3 ...` (a polygon, of which the
    extents count). Lines that repeat another count once, as in ultralytics.

    Returns:
        Classes int64 `[n]`, and boxes float64 `[n, 4]` xyxy as fractions, clipped to 0..1.

    Raises:
        InputError: A line is malformed, not finite, not normalised or of an unknown class.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the label file cannot be read ({error})") from error
    objects = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            objects[" ".join(line.split())] = _parse_line(line, f"{path}, line {number}", class_count)
    classes = np.array([index for index, _ in objects.values()], np.int64)
    return classes, np.array([box for _, box in objects.values()], np.float64).reshape(-1, 4)


def _parse_line(line: str, where: str, class_count: int) -> tuple[int, NDArray[np.float64]]:
    try:
        values = np.array([float(word) for word in line.split()])
    except ValueError:
        values = np.empty(0)
    count = len(values)
    if count < 5 or count % 2 == 0:
        raise InputError(f"{where}: expected 'class x y w h' or 'class x1 y1 x2 y2 ...', got '{line.strip()[:60]}'")
    if not np.isfinite(values).all():
        raise InputError(f"{where}: expected finite numbers, got '{line.strip()[:60]}'")
    if values[0] != int(values[0]) or not 0 <= values[0] < class_count:
        raise InputError(f"{where}: class {values[0]:g} is not one of the dataset's 0..{class_count - 1}")
    xy = values[1:]
    if xy.min() < -_SLACK or xy.max() > 1 + _SLACK:
        raise InputError(f"{where}: expected coordinates as fractions in 0..1, got '{line.strip()[:60]}'")
    if count == 5:
        low, high = xy[:2] - xy[2:] / 2, xy[:2] + xy[2:] / 2
    else:
        points = xy.reshape(-1, 2)
        low, high = points.min(axis=0), points.max(axis=0)
    return int(values[0]), np.clip(np.concatenate([low, high]), 0, 1)


def _ground_truth(
    images: Sequence[ImageRecord],
    boxes: Sequence[NDArray[np.float32]],
    classes: Sequence[NDArray[np.int64]],
    class_names: tuple[str, ...],
) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image, image_boxes, image_classes in zip(images, boxes, classes, strict=True):
        for (x0, y0, x1, y1), index in zip(image_boxes.tolist(), image_classes.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image.image_id,
                    "category_id": index + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    return {
        "images": [
            {"id": image.image_id, "file_name": image.path.name, "width": image.width, "height": image.height}
            for image in images
        ],
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(class_names)],
    }
