"""From raw head maps to `output0`, in slices, reshapes and concatenations and without transposes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AnchorDecode(nn.Module):
    """Raw maps to boxes and scores, with the anchors in the order (level, anchor, y, x).

    With s the sigmoid of a cell's outputs, g its column and row, t the level's stride and a the anchor
    in pixels: `xy = (2 s - 0.5 + g) t`, `wh = (2 s)^2 a`, `score = objectness * class` (YOLOv5).
    Anchors are laid side by side by slicing channels, so that the exported graph has no transpose, and each is
    decoded before that, while it lies in the cache.
    """

    anchors: Tensor

    def __init__(self, anchors: Sequence[Sequence[float]], strides: Sequence[int]) -> None:
        super().__init__()
        pixels = torch.tensor(anchors, dtype=torch.float32).reshape(len(strides), -1, 2)
        self.register_buffer("anchors", pixels, persistent=False)
        self.strides = tuple(strides)

    def describe(self) -> dict[str, Any]:
        """What a reader of raw maps has to know, as JSON values."""
        return {"strides": list(self.strides), "anchors": self.anchors.tolist()}

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return `output0`, float32 `[N, 4 + nc, A]`, for raw maps `[N, anchors * (5 + nc), h, w]`."""
        count = self.anchors.shape[1]
        found = []
        grids = cell_offsets(maps, -0.5)
        for level, (raw, grid, stride) in enumerate(zip(maps, grids, self.strides, strict=True)):
            batch, channels, height, width = raw.shape
            rows = channels // count
            for anchor in range(count):
                slab = raw[:, anchor * rows : (anchor + 1) * rows]
                s = slab.reshape(batch, rows, height * width).sigmoid()
                xy = s[:, 0:2] * (2.0 * stride) + grid * stride
                wh = s[:, 2:4] * s[:, 2:4] * (4.0 * self.anchors[level, anchor].reshape(2, 1))
                found.append(torch.cat((xy, wh, s[:, 5:] * s[:, 4:5]), 1))
        return torch.cat(found, 2)


class DflDecode(nn.Module):
    """Raw maps to boxes and scores, with the cells in the order (level, y, x).

    Each side's distance is the expectation over its bins, `sum_i i * softmax(z)_i` (Generalized Focal
    Loss, eq. 5), in cells from the cell's centre; with one bin the map is the distance itself.
    Softmax is written out, because runtimes transpose for a softmax over a middle axis.
    """

    bins: Tensor

    def __init__(self, bins: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("bins", torch.arange(bins, dtype=torch.float32).reshape(1, 1, bins, 1), persistent=False)
        self.strides = tuple(strides)

    def describe(self) -> dict[str, Any]:
        """What a reader of raw maps has to know, as JSON values."""
        return {"strides": list(self.strides), "bins": self.bins.shape[2]}

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return `output0`, float32 `[N, 4 + nc, A]`, for the maps of `UltralyticsCore`."""
        boxes, classes = maps[0::2], maps[1::2]
        flat = torch.cat([raw.reshape(raw.shape[0], raw.shape[1], -1) for raw in boxes], 2)
        scores = torch.cat([raw.reshape(raw.shape[0], raw.shape[1], -1) for raw in classes], 2)
        sides = self._distances(flat)
        grids = cell_offsets(boxes, 0.5)
        centres = torch.cat(grids, 1)
        strides = torch.cat(
            [torch.full_like(grid[:1], stride) for grid, stride in zip(grids, self.strides, strict=True)], 1
        )
        low, high = sides[:, 0:2], sides[:, 2:4]
        xy = (centres + (high - low) * 0.5) * strides
        wh = (low + high) * strides
        return torch.cat((xy, wh, scores.sigmoid()), 1)

    def _distances(self, flat: Tensor) -> Tensor:
        """Return left, top, right, bottom in cells, float32 `[N, 4, A]`, for `[N, 4 * bins, A]`."""
        count = self.bins.shape[2]
        if count == 1:
            return flat
        logits = flat.reshape(flat.shape[0], 4, count, -1)
        weights = (logits - logits.amax(2, keepdim=True)).exp()
        return (weights * self.bins).sum(2) / weights.sum(2)


def cell_offsets(maps: Sequence[Tensor], offset: float) -> list[Tensor]:
    """Return, level by level, each cell's x and y plus `offset` in cells, float32 `[2, h * w]`, y outermost.

    Works with symbolic heights and widths, so that exported graphs keep them dynamic.
    """
    grids = []
    for level in maps:
        height, width = level.shape[-2:]
        x = (torch.arange(width, dtype=torch.float32, device=level.device) + offset).reshape(1, width)
        y = (torch.arange(height, dtype=torch.float32, device=level.device) + offset).reshape(height, 1)
        # Sums with zeros, because a tensor that is expanded to an open shape takes six operators.
        grids.append(torch.cat([cells.reshape(1, height * width) for cells in (x + y * 0, x * 0 + y)]))
    return grids
