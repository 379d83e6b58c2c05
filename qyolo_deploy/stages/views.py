"""Torch views as runners, and how a recipe wants accuracy to be measured: what training and validation share."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qyolo_deploy.graph.simulate import simulate
from qyolo_deploy.models.registry import detector_of
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.recipe import Recipe
from qyolo_deploy.validate.evaluate import EvalSettings


class TorchRunner:
    """A network in torch as a runner.

    Args:
        detect: float32 `[N, 3, H, W]` in 0..1 to `output0`.
    """

    def __init__(self, detect: Callable[[Tensor], Tensor]) -> None:
        self._detect = detect

    def __call__(self, images: NDArray[np.float32], /) -> NDArray[np.float32]:
        """The same for numpy."""
        with torch.no_grad():
            output: NDArray[np.float32] = self._detect(torch.from_numpy(images)).numpy()
        return output


def eval_settings(recipe: Recipe) -> EvalSettings:
    """Image size, thresholds and letterbox of a recipe."""
    section = recipe.validate_
    return EvalSettings(
        imgsz=recipe.model.imgsz, conf=section.conf, iou=section.iou, max_det=section.max_det, rect=section.rect
    )


def sqnr_db(quantized: QuantizedModel, leave_out: frozenset[str], images: Sequence[NDArray[np.float32]]) -> float:
    """How near the head maps come to the trained ones where some tensors are not rounded, in dB.

    Args:
        quantized: The integers.
        leave_out: Tensors that are not rounded.
        images: float32 `[1, 3, H, W]` in 0..1 each.
    """
    detector = detector_of(quantized.architecture)
    full, other = (simulate(detector, quantized, names).core for names in (frozenset[str](), leave_out))
    signal = noise = 0.0
    with torch.no_grad():
        for image in map(torch.from_numpy, images):
            for one, two in zip(full(image), other(image), strict=True):
                signal += float(one.square().sum())
                noise += float((one - two).square().sum())
    return 10 * math.log10(signal / max(noise, 1e-30))
