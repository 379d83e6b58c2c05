"""Evaluate a detector on a dataset: read, letterbox, run, decode, map back, compute COCO's mAP."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import Letterbox, letterbox, to_tensor
from qyolo_deploy.data.records import DetectionDataset, ImageRecord
from qyolo_deploy.errors import InputError
from qyolo_deploy.validate.coco_map import CocoMetrics, Evaluator, coco_map
from qyolo_deploy.validate.detections import Detections, decode, is_end_to_end
from qyolo_deploy.validate.results import ResultTable

_HELPERS = 2
"""Threads that read, letterbox and decode around a detector that takes one image at a time."""

_READ_AHEAD = 4
"""Images that are prepared before their turn, so that memory does not grow with the dataset; the rest waits on disk."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class DetectorRunner(Protocol):
    """Anything that runs a detector: a loaded engine, a torch model in a wrapper."""

    def __call__(self, images: npt.NDArray[np.float32], /) -> npt.NDArray[np.float32]:
        """Run the detector.

        Args:
            images: float32 `[N, 3, H, W]`, RGB in 0..1.

        Returns:
            `output0`: float32 `[N, 4 + nc, A]`, or `[N, n, 6]` of an end-to-end head; an array that no later
            call changes.
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
    evaluator: Evaluator = "faster",
) -> tuple[CocoMetrics, ResultTable]:
    """Evaluate a detector on every image of a dataset.

    Images are run one by one, because each has its own shape under `rect`. A runner whose attribute `parallel` is
    above 1 is called from so many threads, each of which takes an image from its file to its detections; another one
    is called from this thread, while others prepare the next images and decode what it gave.

    Args:
        runner: The detector.
        dataset: Images and ground truth.
        settings: Size, thresholds, padding.
        progress: Called with the images done and their total.
        evaluator: Implementation of COCO's metrics.

    Returns:
        The metrics, and the detections.

    Raises:
        InputError: An image is not readable, the output is not that of a detector of the dataset's classes,
            or the dataset has no annotated object.
    """
    results = detect(runner, dataset, settings, progress)
    image_ids = [record.image_id for record in dataset.images]
    return coco_map(dataset.ground_truth, dataset.category_ids, results, image_ids, evaluator), results


def detect(
    runner: DetectorRunner,
    dataset: DetectionDataset,
    settings: EvalSettings,
    progress: Callable[[int, int], None] | None = None,
) -> ResultTable:
    """Run a detector on every image of a dataset; see `evaluate`."""

    def prepare(record: ImageRecord) -> _Prepared:
        return _prepare(record, settings)

    def run(image: _Prepared) -> tuple[_Prepared, npt.NDArray[np.float32]]:
        return image, runner(image.tensor)

    def finish(pair: tuple[_Prepared, npt.NDArray[np.float32]]) -> ResultTable:
        image, output = pair
        _check_output(output, dataset, image.record)
        found = decode(output[0], settings.conf, settings.iou, settings.max_det)
        return _to_table(found, image, dataset)

    def all_of_it(record: ImageRecord) -> ResultTable:
        return finish(run(prepare(record)))

    parallel: int = getattr(runner, "parallel", 1)
    parts: list[ResultTable] = []
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(parallel if parallel > 1 else _HELPERS, thread_name_prefix="evaluate")
        stack.callback(pool.shutdown, cancel_futures=True)
        if parallel > 1:
            finished = _in_order(pool, all_of_it, dataset.images, 2 * parallel)
        else:
            ready = stack.enter_context(closing(_in_order(pool, prepare, dataset.images, _READ_AHEAD)))
            finished = _in_order(pool, finish, map(run, ready), _HELPERS)
        for part in stack.enter_context(closing(finished)):
            parts.append(part)
            if progress is not None:
                progress(len(parts), len(dataset.images))
    return ResultTable.join(parts)


def _in_order(
    pool: Executor, function: Callable[[_In], _Out], items: Iterable[_In], ahead: int
) -> Generator[_Out, None, None]:
    """Yield results in the order of the items while a pool computes at most `ahead` of the next ones.

    Items are taken in the thread that takes the results, and errors of either are raised there.
    """
    waiting: deque[Future[_Out]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


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
    if np.isnan(output.max(initial=0)):  # which is NaN if any is, and five times as fast as asking each
        raise InputError(f"The detector's output for {record.path} contains NaN.")


def _to_table(found: Detections, image: _Prepared, dataset: DetectionDataset) -> ResultTable:
    """Express detections in pixels of the image itself."""
    boxes = image.geometry.to_original(found.boxes)
    boxes[:, 2:] -= boxes[:, :2]
    return ResultTable(
        np.full(len(found), image.record.image_id, np.int64),
        np.asarray(dataset.category_ids, np.int64)[found.classes],
        boxes.astype(np.float64),
        found.scores.astype(np.float64),
    )
