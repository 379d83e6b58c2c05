"""Evaluate a detector on a dataset: read, letterbox, run, decode, map back, compute COCO's mAP."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import Letterbox, letterbox, to_tensor
from qyolo_deploy.data.records import DetectionDataset, ImageRecord
from qyolo_deploy.errors import InputError
from qyolo_deploy.validate.coco_map import CocoMetrics, CocoResult, Evaluator, coco_map
from qyolo_deploy.validate.detections import Detections, decode, is_end_to_end

_READ_AHEAD = 4
"""Images that are read and letterboxed before their turn; the rest waits on disk."""


class DetectorRunner(Protocol):
    """Anything that runs a detector: a loaded engine, a torch model in a wrapper."""

    def __call__(self, images: npt.NDArray[np.float32], /) -> npt.NDArray[np.float32]:
        """Run the detector.

        Args:
            images: float32 `[N, 3, H, W]`, RGB in 0..1.

        Returns:
            `output0`: float32 `[N, 4 + nc, A]`, or `[N, n, 6]` of an end-to-end head.
        """


@dataclass(frozen=True)
class EvalSettings:
    """How detections are obtained. The defaults are those of YOLOv5's validation.

    Attributes:
        imgsz: Length of the longer side in pixels.
        rect: Pad each image to the next multiples of `stride` only, rather than to a square.
        conf: Scores above it count.
        iou: Threshold of the non-maximum suppression.
        max_det: Detections kept of an image.
        stride: The largest stride of the network in pixels.
    """

    imgsz: int
    rect: bool
    conf: float = 0.001
    iou: float = 0.6
    max_det: int = 300
    stride: int = 32

    @property
    def letterbox(self) -> Literal["rect", "square"]:
        """The name under which reports state `rect`."""
        return "rect" if self.rect else "square"

    @property
    def thresholds(self) -> dict[str, float]:
        """The thresholds that reports state."""
        return {"conf": self.conf, "iou": self.iou, "max_det": self.max_det}


@dataclass(frozen=True)
class _Prepared:
    record: ImageRecord
    geometry: Letterbox
    tensor: npt.NDArray[np.float32]


def evaluate(
    runner: DetectorRunner,
    dataset: DetectionDataset,
    settings: EvalSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
    evaluator: Evaluator = "faster-coco-eval",
) -> tuple[CocoMetrics, list[CocoResult]]:
    """Evaluate a detector on every image of a dataset.

    Images are run one by one, because each has its own shape under `rect`; a thread reads a few ahead.

    Args:
        runner: The detector.
        dataset: Images and ground truth.
        settings: Size, thresholds, padding.
        progress: Called with the images done and their total.
        evaluator: Implementation of COCO's metrics.

    Returns:
        The metrics, and the detections in COCO's result format.

    Raises:
        InputError: An image is not readable, the output is not that of a detector of the dataset's classes,
            or the dataset has no annotated object.
    """
    results: list[CocoResult] = []
    with contextlib.closing(_read_ahead(dataset.images, settings)) as images:
        for done, image in enumerate(images, start=1):
            output = runner(image.tensor)
            _check_output(output, dataset, image.record)
            found = decode(output[0], settings.conf, settings.iou, settings.max_det)
            results += _to_coco(found, image, dataset)
            if progress is not None:
                progress(done, len(dataset.images))
    image_ids = [record.image_id for record in dataset.images]
    metrics = coco_map(dataset.ground_truth, dataset.category_ids, results, image_ids, evaluator)
    return metrics, results


def _read_ahead(records: Sequence[ImageRecord], settings: EvalSettings) -> Generator[_Prepared, None, None]:
    """Yield the images in order while a thread prepares the next ones; its errors are raised here."""
    waiting: deque[Future[_Prepared]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        for record in records:
            waiting.append(pool.submit(_prepare, record, settings))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(record: ImageRecord, settings: EvalSettings) -> _Prepared:
    padded, geometry = letterbox(read_image(record.path), settings.imgsz, stride=settings.stride, rect=settings.rect)
    return _Prepared(record, geometry, to_tensor(padded))


def _check_output(output: npt.NDArray[np.float32], dataset: DetectionDataset, record: ImageRecord) -> None:
    classes = len(dataset.class_names)
    if output.ndim != 3 or len(output) != 1:
        raise InputError(
            f"The detector's output has the shape {list(output.shape)}, expected [1, {4 + classes}, anchors]."
        )
    if is_end_to_end(output.shape):
        found = int(output[0, :, 5].max(initial=-1)) + 1
        mismatch = found > classes
    else:
        found = output.shape[1] - 4
        mismatch = found != classes
    if mismatch:
        raise InputError(
            f"The detector has {found} classes, but {dataset.source} has {classes}.",
            "Validate it on a dataset with the classes it was trained for.",
        )
    if np.isnan(output).any():
        raise InputError(f"The detector's output for {record.path} contains NaN.")


def _to_coco(found: Detections, image: _Prepared, dataset: DetectionDataset) -> list[CocoResult]:
    """Express detections in pixels of the image itself."""
    boxes = image.geometry.to_original(found.boxes)
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {
            "image_id": image.record.image_id,
            "category_id": dataset.category_ids[label],
            "bbox": box,
            "score": score,
        }
        for box, score, label in zip(boxes.tolist(), found.scores.tolist(), found.classes, strict=True)
    ]
