"""What a loaded dataset is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ImageRecord:
    """One image: its id in the annotations, its file, and its size in px."""

    image_id: int
    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class Annotations:
    """What an annotation source says about a list of images, in the order of `images`."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[ImageRecord, ...]
    boxes: tuple[NDArray[np.float32], ...]
    classes: tuple[NDArray[np.int64], ...]
    ground_truth: dict[str, Any]


@dataclass(frozen=True)
class DetectionDataset:
    """One split of a detection dataset.

    Args:
        source: What it was loaded from.
        split: Name of the split.
        class_names: Names in the order of the network's classes.
        category_ids: COCO category id of each class.
        images: All images of the split, also those without objects.
        boxes: For each image float32 `[n, 4]` xyxy in px, clipped to the image, without crowds: for training.
        classes: For each image int64 `[n]`, the class of each box.
        ground_truth: COCO-format dict of images, annotations and categories, crowds included: for evaluation.
        annotation_file: The COCO JSON that the boxes come from, None where they come from YOLO labels.
        labeled: How many of the images, counted from the first, have annotations; None for all.
    """

    source: Path
    split: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[ImageRecord, ...]
    boxes: tuple[NDArray[np.float32], ...]
    classes: tuple[NDArray[np.int64], ...]
    ground_truth: dict[str, Any]
    annotation_file: Path | None
    labeled: int | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)
