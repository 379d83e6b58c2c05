"""Precision over recall of each class, by COCO's evaluation at one threshold of overlap."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.validate.results import ResultTable

IOU = 0.5
_RECALLS = 101  # that COCO counts
_EVERY = 2  # of them
_DECIMALS = 4


def precision_recall(dataset: DetectionDataset, results: Mapping[str, ResultTable]) -> dict[str, Any]:
    """Compute the curves of each view, from at most 100 detections an image and class, as COCO counts.

    Args:
        dataset: Images and ground truth.
        results: Detections by view.

    Returns:
        JSON data: `iou`; `recall`, the recalls of all curves; `views`, by view `mean`, the mean of the classes'
        precisions at each recall, and `per_class`, the precisions of each class that has annotated objects. A recall
        that is never reached has the precision 0.
    """
    curves = {view: _curves(dataset, found) for view, found in results.items()}
    recall = np.linspace(0, 1, _RECALLS)[::_EVERY].round(_DECIMALS).tolist()
    return {"iou": IOU, "recall": recall, "views": curves}


def _curves(dataset: DetectionDataset, results: ResultTable) -> dict[str, Any]:
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval_faster(COCO(_truth(dataset)), COCO(_found(dataset, results)), "bbox")
        run.params.imgIds = [record.image_id for record in dataset.images]
        run.params.catIds = list(dataset.category_ids)
        run.params.iouThrs = np.array([IOU])
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.evaluate()
        run.accumulate()
    precision = np.asarray(run.eval["precision"], np.float64)[0, ::_EVERY, :, 0, -1]
    present = precision.min(axis=0) >= 0  # -1 means no annotated object
    names = [name for name, is_present in zip(dataset.class_names, present, strict=True) if is_present]
    curves = precision[:, present]
    return {
        "mean": curves.mean(axis=1).round(_DECIMALS).tolist(),
        "per_class": dict(zip(names, curves.T.round(_DECIMALS).tolist(), strict=True)),
    }


def _truth(dataset: DetectionDataset) -> dict[str, Any]:
    """Number the annotations from 1: the evaluation takes 0 for "not matched"."""
    truth = dataset.ground_truth
    annotations = [
        {"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0, **a, "id": i} for i, a in enumerate(truth["annotations"], 1)
    ]
    return {"images": truth["images"], "annotations": annotations, "categories": truth["categories"]}


def _found(dataset: DetectionDataset, results: ResultTable) -> dict[str, Any]:
    annotations = [
        {**r, "id": i, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0}
        for i, r in enumerate(results.to_coco(), start=1)
    ]
    return {**dataset.ground_truth, "annotations": annotations}
