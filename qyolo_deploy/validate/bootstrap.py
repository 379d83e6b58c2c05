"""How much of a difference in mAP is chance: average precision on resampled images, paired between views.

The images of a dataset are a sample. Drawing as many from them with replacement, again and again, shows how far a
figure would move on other images (Efron 1979); views that are looked at on the same draws share that movement, so that
their difference is known much better than either figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.recipe import PER_CLASS
from qyolo_deploy.validate.matches import AREAS, ClassMatches, match_classes
from qyolo_deploy.validate.report import EvalReport, MapInterval
from qyolo_deploy.validate.results import ResultTable

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]

RESAMPLES = 1000
CONFIDENCE = 0.95
_RECALLS = np.linspace(0.0, 1.0, 101)
_CELLS = 4_000_000
"""Detections times resamples that are held at a time."""

METRICS = {
    "map50_95": ("all", slice(None)),
    "map50": ("all", slice(0, 1)),
    "map75": ("all", slice(5, 6)),
    "map_small": ("small", slice(None)),
    "map_medium": ("medium", slice(None)),
    "map_large": ("large", slice(None)),
}
"""Size of objects and IoU thresholds of each metric."""


class Bootstrap:
    """A view's metrics on resampled images.

    Two of the same images, number of resamples and seed look at the same draws.

    Args:
        classes: Matches by class name.
        images: Number of images.
        resamples: How often images are drawn.
        seed: Of the draws.
    """

    def __init__(
        self, classes: dict[str, ClassMatches], images: int, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        self.classes, self._images = classes, images
        self._resamples, self._seed = resamples, seed
        self._known: dict[str, Float64] = {}

    def samples(self, metric: str) -> Float64 | None:
        """The metric on each draw, float64 `[resamples]`; NaN where it is undefined, None if it cannot be resampled."""
        if metric.startswith(PER_CLASS):
            names = [metric.removeprefix(PER_CLASS)]
        elif metric in METRICS:
            names = list(self.classes)
        else:
            return None
        if any(name not in self.classes for name in names):
            return None
        if metric not in self._known:
            area, thresholds = METRICS.get(metric, METRICS["map50_95"])
            rng = np.random.default_rng(self._seed)
            draws = rng.multinomial(self._images, np.full(self._images, 1 / self._images), self._resamples)
            chosen = [self.classes[name] for name in names]
            self._known[metric] = mean_precision(chosen, draws.astype(np.int32), area, thresholds)
        return self._known[metric]


def bootstrap(dataset: DetectionDataset, results: ResultTable) -> Bootstrap:
    """A view's metrics on resampled images of a dataset, from its detections there."""
    image_ids = [record.image_id for record in dataset.images]
    matches = match_classes(dataset.ground_truth, dataset.category_ids, results, image_ids)
    return Bootstrap(dict(zip(dataset.class_names, matches, strict=True)), len(dataset))


def with_interval(report: EvalReport, base: EvalReport, resampled: Mapping[str, Bootstrap]) -> EvalReport:
    """The report of a view with the interval of its difference to another one in mAP50-95.

    Args:
        report: Of the view.
        base: Of the view to compare with; its own report stays as it is.
        resampled: Both views on the same draws.
    """
    if report.name == base.name:
        return report
    ours, theirs = (resampled[view].samples("map50_95") for view in (report.name, base.name))
    assert ours is not None and theirs is not None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(ours - theirs, (tail, 1 - tail))
    found = MapInterval(
        relative_to=base.name,
        difference=report.metrics.map50_95 - base.metrics.map50_95,
        low=float(low),
        high=float(high),
        confidence=CONFIDENCE,
        resamples=len(ours),
    )
    return replace(report, interval=found)


def mean_precision(
    classes: Sequence[ClassMatches], draws: Int32, area: str = "all", thresholds: slice = slice(None)
) -> Float64:
    """Average precision, averaged over IoU thresholds and over the classes that have objects.

    Args:
        classes: Matches of each class.
        draws: int32 `[B, images]`, how often each image counts.
        area: Size of the objects that count, a key of `AREAS`.
        thresholds: Which IoU thresholds.

    Returns:
        float64 `[B]`; NaN where no class has an object.
    """
    total, present = np.zeros(len(draws)), np.zeros(len(draws), np.int64)
    for one in classes:
        precision = _class_precision(one, draws, list(AREAS).index(area), thresholds)
        there = ~np.isnan(precision)
        total[there] += precision[there]
        present += there
    with np.errstate(invalid="ignore"):
        return np.asarray(total / present, np.float64)


def _class_precision(one: ClassMatches, draws: Int32, area: int, thresholds: slice) -> Float64:
    objects = draws @ one.objects[area]
    matched = (one.matched & ~one.ignored)[area, thresholds]
    ignored = one.ignored[area, thresholds]
    precision = np.zeros(len(draws))
    # Nothing behind the last detection that is right has a say.
    last = int(np.flatnonzero(matched.any(axis=0)).max(initial=-1)) + 1
    rows = max(1, _CELLS // max(last, 1))
    for start in range(0, len(draws), rows):
        part = slice(start, start + rows)
        weights = draws[part][:, one.images[:last]]
        precision[part] = _weighted_precision(weights, matched[:, :last], ignored[:, :last], objects[part])
    precision[objects == 0] = np.nan
    return precision


def _weighted_precision(
    weights: Int32, matched: npt.NDArray[np.bool_], ignored: npt.NDArray[np.bool_], objects: npt.NDArray[np.int64]
) -> Float64:
    """Mean over the thresholds of the average precision of detections that count several times, float64 `[B]`."""
    total = np.zeros(len(weights))
    all_before = np.cumsum(weights, axis=1)
    for right, skip in zip(matched, ignored, strict=True):
        places = np.flatnonzero(right)
        if not len(places):
            continue
        correct = np.cumsum(weights[:, places], axis=1)
        counted = all_before[:, places]
        without = np.flatnonzero(skip)
        if len(without):
            before = np.cumsum(weights[:, without], axis=1)
            before = np.concatenate((np.zeros((len(weights), 1), before.dtype), before), axis=1)
            counted = counted - before[:, np.searchsorted(without, places)]
        precision = correct / (counted + np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # The precision at a recall level is that of the first detection that reaches it.
        recall = correct / np.maximum(objects, 1)[:, None]
        reached = np.searchsorted(_RECALLS, recall, side="right")
        total += (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
    return total / (len(_RECALLS) * len(matched))
