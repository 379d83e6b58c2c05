"""Precision over recall of each class, as COCO interpolates it at one threshold of overlap."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qyolo_deploy.validate.matches import AREAS, IOU_THRESHOLDS, ClassMatches

_RECALLS = np.linspace(0.0, 1.0, 101)  # that COCO counts
_EVERY = 2  # of them
_DECIMALS = 4
_AREA, _THRESHOLD = list(AREAS).index("all"), 0

Float64 = npt.NDArray[np.float64]


def precision_recall(matches: Mapping[str, Mapping[str, ClassMatches]]) -> dict[str, Any]:
    """Compute the curves of each view.

    Args:
        matches: View -> class name -> what its detections find.

    Returns:
        JSON data: `iou`; `recall`, the recalls of all curves; `views`, by view `mean`, the mean of the classes'
        precisions at each recall, and `per_class`, the precisions of each class that has annotated objects. A recall
        that is never reached has the precision 0.
    """
    curves = {view: _curves(classes) for view, classes in matches.items()}
    recall = _RECALLS[::_EVERY].round(_DECIMALS).tolist()
    return {"iou": float(IOU_THRESHOLDS[_THRESHOLD]), "recall": recall, "views": curves}


def _curves(classes: Mapping[str, ClassMatches]) -> dict[str, Any]:
    found = {name: _precision(one) for name, one in classes.items() if one.objects[_AREA].any()}
    return {
        "mean": np.mean(list(found.values()), axis=0).round(_DECIMALS).tolist(),
        "per_class": {name: curve.round(_DECIMALS).tolist() for name, curve in found.items()},
    }


def _precision(one: ClassMatches) -> Float64:
    """The highest precision at each recall or a higher one, float64 `[recalls]`."""
    right = one.matched[_AREA, _THRESHOLD][~one.ignored[_AREA, _THRESHOLD]]
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / one.objects[_AREA].sum(), _RECALLS[::_EVERY], side="left")
    return np.append(envelope, 0.0)[places]
