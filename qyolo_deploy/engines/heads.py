"""Decoding of raw head maps on the host, of the candidates above a threshold alone.

An engine that gives its raw maps is spared the arithmetic and the copies for the thousands of anchors that nobody
looks at. What the maps mean is told by the file's metadata, under `raw_head`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qyolo_deploy.errors import InputError

Float32 = npt.NDArray[np.float32]

METADATA_KEY = "raw_head"  # `head` holds the name of a class in files of ultralytics
_MULTIPLE = 8  # columns of an output; one of six would be read as that of an end-to-end head


@dataclass(frozen=True)
class Head:
    """How raw maps become boxes and scores; see `AnchorDecode` and `DflDecode` for the formulas.

    Args:
        strides: Pixels per cell of each level.
        anchors: Widths and heights in pixels, `[levels, anchors, 2]`; empty for heads without anchors.
        bins: Of each side's distribution, for heads without anchors.
    """

    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...] = ()
    bins: int = 0

    @classmethod
    def parse(cls, text: object) -> "Head | None":
        """The head that metadata describe; None where they describe none.

        Raises:
            InputError: If the description is not one.
        """
        if text is None:
            return None
        try:
            data = json.loads(str(text))
            anchors = tuple(tuple((float(w), float(h)) for w, h in level) for level in data.get("anchors", ()))
            head = cls(tuple(map(int, data["strides"])), anchors, int(data.get("bins", 0)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"the metadata 'raw_head' do not describe a head ({error})") from error
        if not head.strides or bool(head.anchors) == bool(head.bins) or len(head.anchors) not in (0, len(head.strides)):
            raise InputError("the metadata 'raw_head' do not describe a head (expected strides, and anchors or bins)")
        return head

    def decode(self, maps: Sequence[Float32], conf: float) -> Float32:
        """Candidates with a score above the threshold, as `output0` has them and in its order.

        Args:
            maps: Raw maps, float32 `[N, C, h, w]` each: one a level with anchors, else boxes and classes in turn.
            conf: In 0..1.

        Returns:
            Float32 `[N, 4 + nc, A]`; images with fewer candidates than others are filled up with zeros.
        """
        of_image = self._with_anchors if self.anchors else self._without_anchors
        found = [of_image([level[index] for level in maps], conf) for index in range(len(maps[0]))]
        longest = max(candidates.shape[1] for candidates in found)
        columns = -(-max(longest, 1) // _MULTIPLE) * _MULTIPLE
        output = np.zeros((len(found), found[0].shape[0], columns), np.float32)
        for index, candidates in enumerate(found):
            output[index, :, : candidates.shape[1]] = candidates
        return output

    def _with_anchors(self, maps: Sequence[Float32], conf: float) -> Float32:
        found = []
        for raw, stride, anchors in zip(maps, self.strides, self.anchors, strict=True):
            height, width = raw.shape[1:]
            slabs = raw.reshape(len(anchors), -1, height * width)
            for slab, anchor in zip(slabs, anchors, strict=True):
                # A score is objectness times a probability, so it is no larger than the objectness.
                cells = np.flatnonzero(slab[4] > _logit(conf))
                s = _sigmoid(slab[:, cells])
                scores = s[5:] * s[4]
                kept = (scores > conf).any(0)
                s, scores, cells = s[:, kept], scores[:, kept], cells[kept]
                xy = s[:2] * np.float32(2 * stride) + _cells(cells, width, -0.5) * np.float32(stride)
                wh = s[2:4] * s[2:4] * (4 * np.array(anchor, np.float32))[:, None]
                found.append(np.concatenate((xy, wh, scores)))
        return np.concatenate(found, 1)

    def _without_anchors(self, maps: Sequence[Float32], conf: float) -> Float32:
        found = []
        for boxes, classes, stride in zip(maps[0::2], maps[1::2], self.strides, strict=True):
            width = classes.shape[2]
            flat = classes.reshape(len(classes), -1)
            cells = np.flatnonzero(flat.max(0) > _logit(conf))
            low, high = np.split(self._distances(boxes.reshape(len(boxes), -1)[:, cells]), 2)
            centres = _cells(cells, width, 0.5)
            xy = (centres + (high - low) * np.float32(0.5)) * np.float32(stride)
            wh = (low + high) * np.float32(stride)
            found.append(np.concatenate((xy, wh, _sigmoid(flat[:, cells]))))
        return np.concatenate(found, 1)

    def _distances(self, flat: Float32) -> Float32:
        """Left, top, right, bottom in cells, `[4, n]`, from `[4 * bins, n]`."""
        if self.bins == 1:
            return flat
        logits = flat.reshape(4, self.bins, -1)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        steps = np.arange(self.bins, dtype=np.float32)[:, None]
        distances: Float32 = (weights * steps).sum(1) / weights.sum(1)
        return distances


def head_metadata(description: dict[str, Any]) -> str:
    """The text of the metadata `raw_head`."""
    return json.dumps(description, separators=(",", ":"))


def _sigmoid(x: Float32) -> Float32:
    with np.errstate(over="ignore"):  # exp(89) is infinite in float32, and its sigmoid the 0 that it should be
        value: Float32 = np.float32(1) / (np.float32(1) + np.exp(-x))
    return value


def _logit(conf: float) -> float:
    """What a sigmoid above the threshold comes from, a little less, so that rounding loses none."""
    if conf <= 0:
        return -np.inf
    return float(np.log(conf / (1 - conf))) - 1e-4 if conf < 1 else np.inf


def _cells(index: npt.NDArray[np.intp], width: int, offset: float) -> Float32:
    """Column and row of cells plus an offset, `[2, n]`."""
    rows, columns = np.divmod(index, width)
    return np.stack((columns, rows)).astype(np.float32) + np.float32(offset)
