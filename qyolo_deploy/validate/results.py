"""Detections of a whole dataset, held in arrays: a list of dicts takes twenty times the memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

CocoResult = dict[str, Any]
"""One detection: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels of the image), `score`."""


@dataclass(frozen=True)
class ResultTable:
    """Detections in COCO's terms, a row each.

    Attributes:
        image_ids: int64 `[n]`.
        category_ids: int64 `[n]`.
        boxes: float64 `[n, 4]`, x, y, width, height in pixels of the image.
        scores: float64 `[n]`.
    """

    image_ids: Int64
    category_ids: Int64
    boxes: Float64
    scores: Float64

    def __post_init__(self) -> None:
        n = len(self.scores)
        shapes = (self.image_ids.shape, self.category_ids.shape, self.boxes.shape, self.scores.shape)
        if shapes != ((n,), (n,), (n, 4), (n,)):
            raise ValueError(f"the columns have the shapes {shapes}, expected [n], [n], [n, 4], [n]")

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def join(cls, parts: Sequence["ResultTable"]) -> "ResultTable":
        """One table of the rows of several, in their order."""
        return cls(
            np.concatenate([np.empty(0, np.int64), *(part.image_ids for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *(part.category_ids for part in parts)]),
            np.concatenate([np.empty((0, 4)), *(part.boxes for part in parts)]),
            np.concatenate([np.empty(0), *(part.scores for part in parts)]),
        )

    @classmethod
    def from_coco(cls, results: Sequence[CocoResult]) -> "ResultTable":
        """The table of detections in COCO's result format."""
        return cls(
            np.array([result["image_id"] for result in results], np.int64),
            np.array([result["category_id"] for result in results], np.int64),
            np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4),
            np.array([result["score"] for result in results], np.float64),
        )

    def take(self, rows: npt.NDArray[Any]) -> "ResultTable":
        """The rows that an index or a mask names."""
        return ResultTable(self.image_ids[rows], self.category_ids[rows], self.boxes[rows], self.scores[rows])

    def to_coco(self) -> list[CocoResult]:
        """The detections in COCO's result format."""
        columns = (self.image_ids, self.category_ids, self.boxes, self.scores)
        return [
            {"image_id": image, "category_id": category, "bbox": box, "score": score}
            for image, category, box, score in zip(*(column.tolist() for column in columns), strict=True)
        ]
