"""What the views see on single images: totals, and the images on which the engines lose most against float."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.data.dataset import image_names
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.recipe import TORCH_VIEWS
from qyolo_deploy.validate.image_scores import CONF, IOU, ImageMatch, match_images, worst_losses
from qyolo_deploy.validate.results import ResultTable

_EXAMPLES = 8
_SIDE = 416  # px of a shown image's longer side
_QUALITY = 70
_SHEET_IMAGES, _THUMBNAIL = 24, 72


def describe_images(dataset: DetectionDataset, results: Mapping[str, ResultTable]) -> dict[str, Any]:
    """Compare the views image by image.

    Args:
        dataset: The validation images.
        results: Detections by view; `float` is what the engines are compared with.

    Returns:
        JSON data; `examples` are the worst losses, whose `webp_base64` is for the page alone.
    """
    matches = {view: match_images(dataset, found) for view, found in results.items()}
    engines = [view for view in results if view not in ("float", *TORCH_VIEWS)]
    worst = worst_losses(matches["float"], [matches[view] for view in engines], _EXAMPLES)
    return {
        "conf": CONF,
        "iou": IOU,
        "views": {view: _totals(found, matches["float"]) for view, found in matches.items()},
        "examples": [_example(dataset, place, {v: matches[v][place] for v in ("float", *engines)}) for place in worst],
    }


def _totals(matches: Sequence[ImageMatch], reference: Sequence[ImageMatch]) -> dict[str, Any]:
    changes = [match.score - other.score for match, other in zip(matches, reference, strict=True)]
    return {
        **{kind: sum(len(getattr(match, kind)) for match in matches) for kind in ("right", "wrong", "missed")},
        "images_worse": sum(change < 0 for change in changes),
        "images_better": sum(change > 0 for change in changes),
    }


def _example(dataset: DetectionDataset, place: int, matches: Mapping[str, ImageMatch]) -> dict[str, Any]:
    record = dataset.images[place]
    names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    return {
        "title": image_names(dataset)[place],
        "width": record.width,
        "height": record.height,
        "webp_base64": _webp(_shrunk(read_image(record.path), _SIDE), _QUALITY),
        "views": {view: _detections(match, names) for view, match in matches.items()},
    }


def _detections(match: ImageMatch, names: Mapping[int, str]) -> dict[str, Any]:
    def told(item: Mapping[str, Any], kind: str) -> dict[str, Any]:
        box = [round(float(side), 1) for side in item["bbox"]]
        entry = {"kind": kind, "name": names.get(item["category_id"], "?"), "box": box}
        return entry | ({"score": round(item["score"], 3)} if "score" in item else {})

    kinds = ("missed", "wrong", "right")
    return {
        "score": round(match.score, 4),
        **{kind: len(getattr(match, kind)) for kind in kinds},
        "boxes": [told(item, kind) for kind in kinds for item in getattr(match, kind)],
    }


def contact_sheet(dataset: DetectionDataset) -> str:
    """The first images of a dataset as one picture, in base64."""
    tiles = []
    for record in dataset.images[:_SHEET_IMAGES]:
        image = read_image(record.path)
        side = min(image.shape[:2])
        top, left = ((length - side) // 2 for length in image.shape[:2])
        square = image[top : top + side, left : left + side]
        tiles.append(cv2.resize(square, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA))
    columns = min(12, len(tiles))
    tiles += [np.full_like(tiles[0], 114)] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    return _webp(np.vstack(rows), _QUALITY)


def _shrunk(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    factor = side / max(image.shape[:2])
    if factor >= 1:
        return image
    height, width = (max(1, round(length * factor)) for length in image.shape[:2])
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _webp(image: NDArray[np.uint8], quality: int) -> str:
    """RGB uint8 `[H, W, 3]` as WebP in base64."""
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    _, encoded = cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, quality])
    return base64.b64encode(encoded.tobytes()).decode()
