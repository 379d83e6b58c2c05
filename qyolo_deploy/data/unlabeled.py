"""Images without annotations, which distillation and calibration can use beside the training split."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from qyolo_deploy.data.images import list_images, read_size
from qyolo_deploy.data.records import DetectionDataset, ImageRecord
from qyolo_deploy.errors import InputError


def add_unlabeled(dataset: DetectionDataset, folder: Path) -> DetectionDataset:
    """The dataset with the images of a folder behind its own; `labeled` tells them apart.

    Args:
        dataset: The training split.
        folder: Images, also in folders below it.

    Raises:
        InputError: The folder holds no images, one is unreadable, or one belongs to the split already.
    """
    paths = list_images(folder)
    if not paths:
        raise InputError(f"{folder}: holds no images (data.unlabeled)")
    known = {image.path.resolve() for image in dataset.images}
    if twice := next((path for path in paths if path.resolve() in known), None):
        raise InputError(f"{twice}: is an image of the split '{dataset.split}' and of data.unlabeled")
    with ThreadPoolExecutor(max_workers=8) as pool:
        sizes = list(pool.map(read_size, paths))
    first = max((image.image_id for image in dataset.images), default=0) + 1
    added = [
        ImageRecord(first + index, path, *size) for index, (path, size) in enumerate(zip(paths, sizes, strict=True))
    ]
    return replace(
        dataset,
        images=(*dataset.images, *added),
        boxes=(*dataset.boxes, *(np.zeros((0, 4), np.float32) for _ in added)),
        classes=(*dataset.classes, *(np.zeros(0, np.int64) for _ in added)),
        labeled=len(dataset),
    )
