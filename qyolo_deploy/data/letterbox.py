"""Scaling and padding of images to a network's input, and boxes back to the image."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

PAD_VALUE = 114


@dataclass(frozen=True)
class Letterbox:
    """How an image was placed in the network's input.

    Args:
        ratio: Size in the input over size in the image.
        pad_x: Padding on the left in px of the input.
        pad_y: Padding on the top in px of the input.
        width: Width of the image in px.
        height: Height of the image in px.
    """

    ratio: float
    pad_x: float
    pad_y: float
    width: int
    height: int

    def to_original(self, boxes_xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
        """Move boxes `[..., 4]` from px of the input to px of the image, clipped to the image."""
        shift = np.array([self.pad_x, self.pad_y] * 2, np.float32)
        boxes = (np.asarray(boxes_xyxy, np.float32) - shift) / np.float32(self.ratio)
        limit = np.array([self.width, self.height] * 2, np.float32)
        return np.asarray(np.clip(boxes, 0, limit), np.float32)


def letterbox(
    image: NDArray[np.uint8], imgsz: int, stride: int = 32, rect: bool = True
) -> tuple[NDArray[np.uint8], Letterbox]:
    """Scale the longer side to `imgsz`, then pad with grey on all sides.

    As in the validation of YOLOv5 (release 7.0): sides are rounded up, images are enlarged with bilinear and
    shrunk with area interpolation (ultralytics shrinks with bilinear interpolation too), and half a stride is
    added before a rectangular input is rounded up to the stride, which makes a 640 px image 672 px wide and is
    worth 0.4 mAP to yolov5n. Padding that is odd is larger by one at the right and at the bottom.

    Args:
        image: uint8 `[H, W, 3]`.
        imgsz: Length in px of the longer side; a multiple of `stride`.
        stride: What both sides of the result are multiples of.
        rect: Whether to pad to a multiple of `stride` near the image's own shape, instead of to a square.

    Returns:
        uint8 `[h, w, 3]`, and the placement.
    """
    height, width = image.shape[:2]
    longer = max(height, width)
    ratio = imgsz / longer
    # In integers, because the ceil of a float product that is rounded up past a whole number adds a pixel.
    new_width, new_height = (-(-side * imgsz // longer) for side in (width, height))
    if ratio != 1:
        method = cv2.INTER_LINEAR if ratio > 1 else cv2.INTER_AREA
        image = np.asarray(cv2.resize(image, (new_width, new_height), interpolation=method), np.uint8)
    target_width, target_height = (
        math.ceil(side / stride + 0.5) * stride if rect else imgsz for side in (new_width, new_height)
    )
    left, right = _halves(target_width - new_width)
    top, bottom = _halves(target_height - new_height)
    grey = (PAD_VALUE, PAD_VALUE, PAD_VALUE)
    padded = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=grey)
    return np.asarray(padded, np.uint8), Letterbox(ratio, float(left), float(top), width, height)


def to_tensor(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn uint8 `[H, W, 3]` into the network's input, float32 `[1, 3, H, W]` in 0..1."""
    planes = np.empty((1, 3, *image.shape[:2]), np.float32)
    # Channel by channel, which reads and writes memory in order, takes half as long as a transposed copy; a division
    # that converts as it goes takes twice as long as both in turn.
    for plane, channel in zip(planes[0], cv2.split(image), strict=True):
        plane[...] = channel
    planes /= np.float32(255)
    return planes


def _halves(padding: int) -> tuple[int, int]:
    return padding // 2, padding - padding // 2
