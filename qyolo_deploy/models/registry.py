"""Find the builder of an architecture, build it and fill it with weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import Detector, ModelSpec
from qyolo_deploy.models.ultralytics import build_ultralytics, spec_from_config
from qyolo_deploy.models.yolov5 import build_yolov5

BUILDERS: Mapping[str, Callable[[ModelSpec], Detector]] = {
    "yolov5": build_yolov5,
    "ultralytics": build_ultralytics,
}
