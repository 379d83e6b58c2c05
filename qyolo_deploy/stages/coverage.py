"""What a float detector makes of an image, as one row of numbers: for calibration subsets by coverage."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qyolo_deploy.console import Tick
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.data.records import ImageRecord
from qyolo_deploy.errors import InputError
from qyolo_deploy.graph.features import Teacher
from qyolo_deploy.models.registry import load_detector


def describe_images(
    images: Sequence[ImageRecord], weights: Path, imgsz: int, progress: Tick | None = None
) -> NDArray[np.float32]:
    """Mean and standard deviation of every channel of every block output.

    Each image goes through the network alone, so that its row does not depend on its neighbours.

    Args:
        images: What is described, letterboxed to a square as for calibration.
        weights: Checkpoint of the float detector.
        imgsz: Side of the square in px.
        progress: Called with images described, and how many there are.

    Returns:
        float32 `[N, 2 C]`, with C channels of all block outputs together.

    Raises:
        InputError: The checkpoint or an image is not usable, or an activation is not finite.
    """
    teacher = Teacher(load_detector(weights, None, None, 0))
    rows = []
    for image in images:
        pixels = to_tensor(letterbox(read_image(image.path), imgsz, rect=False)[0])
        _, blocks = teacher(torch.from_numpy(pixels))
        moments = [torch.std_mean(block, dim=(0, 2, 3), correction=0) for block in blocks]
        rows.append(torch.cat([part for std, mean in moments for part in (mean, std)]).numpy())
        if not np.isfinite(rows[-1]).all():
            raise InputError(f"{weights}: activations on {image.path} are not finite")
        if progress is not None:
            progress(len(rows), len(images))
    return np.stack(rows)
