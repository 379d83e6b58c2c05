"""Anchor-free detectors of ultralytics as a core and a decode; the only importer of its models."""

import copy
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import Detector, ModelSpec
from qyolo_deploy.models.decode import DflDecode
from qyolo_deploy.models.ultralytics_config import check_config, read_config
from qyolo_deploy.models.ultralytics_env import import_ultralytics

# What a row with arguments that do not fit its layer makes ultralytics and torch raise.
_UNBUILDABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class UltralyticsCore(nn.Module):
    """The layers up to the head's last convolutions, with ultralytics' tensor names.

    Heads with a one-to-one branch (26, v10) keep that branch alone; it is what they detect with.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.model = layers
        head = self._head()
        self._one_to_one = getattr(head, "one2one_cv2", None) is not None
        if self._one_to_one:
            head.cv2 = head.cv3 = None

    def _head(self) -> Any:
        return self.model[len(self.model) - 1]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return (box_0, class_0, box_1, class_1, ...) for images float32 `[N, 3, H, W]` in 0..1.

        A box map is float32 `[N, 4 * reg_max, h, w]`, a class map `[N, nc, h, w]` of logits.
        """
        outputs: list[Any] = []
        x: Any = images
        for layer in self.model:
            source: Any = layer.f
            if source != -1:
                x = _route(x, outputs, source)
            if layer.i == len(self.model) - 1:
                break
            x = layer(x)
            outputs.append(x)
        head = self._head()
        boxes = head.one2one_cv2 if self._one_to_one else head.cv2
        classes = head.one2one_cv3 if self._one_to_one else head.cv3
        maps: list[Tensor] = []
        for level, feature in enumerate(x):
            maps += [boxes[level](feature), classes[level](feature)]
        return tuple(maps)


def _route(previous: Any, outputs: Sequence[Any], source: int | list[int]) -> Any:
    """Return the outputs that a layer reads: one tensor for one index, a list for several."""
    if isinstance(source, int):
        return outputs[source]
    return [previous if index == -1 else outputs[index] for index in source]


class UltralyticsDetector(Detector):
    """A detection model of ultralytics."""

    def __init__(self, spec: ModelSpec, layers: nn.Sequential) -> None:
        super().__init__()
        head: Any = layers[-1]
        self.spec = spec
        self.core = UltralyticsCore(layers)
        self.decode = DflDecode(head.reg_max, spec.strides)
        self._one_to_one = self.core._one_to_one

    def loss(self, raw_maps: Sequence[Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Return ultralytics' detection loss: CIoU, distribution focal loss and binary cross-entropy.

        Its gains are ultralytics' defaults. The core may meanwhile be a quantized graph, since nothing
        but the maps is used. One-to-one heads are assigned as ultralytics assigns that branch.
        """
        boxes, classes = list(raw_maps[0::2]), list(raw_maps[1::2])
        predictions = {
            "boxes": torch.cat([raw.flatten(2) for raw in boxes], 2),
            "scores": torch.cat([raw.flatten(2) for raw in classes], 2),
            "feats": boxes,  # of the features the loss reads sizes only
        }
        parts, items = self._criterion(boxes[0])(predictions, batch)
        return parts.sum(), {name: float(value) for name, value in items.items()}

    def _criterion(self, example: Tensor) -> Any:
        import_ultralytics()
        losses: Any = importlib.import_module("ultralytics.utils.loss")
        gains: Any = importlib.import_module("ultralytics.utils").DEFAULT_CFG
        assert isinstance(self.decode, DflDecode)
        head = SimpleNamespace(
            stride=torch.tensor(self.spec.strides, dtype=torch.float32, device=example.device),
            nc=len(self.spec.names),
            reg_max=self.decode.bins.shape[2],
        )
        model = SimpleNamespace(args=gains, model=[head], parameters=lambda: iter((example,)))
        assignment = {"tal_topk": 7, "tal_topk2": 1} if self._one_to_one else {}
        return losses.v8DetectionLoss(model, **assignment)


def build_ultralytics(spec: ModelSpec) -> UltralyticsDetector:
    """Build a freshly initialised detector of ultralytics.

    Raises:
        InputError: The config is not one of a detection model that this package can quantize.
    """
    layers, strides = _build_layers(spec.config, len(spec.names))
    if strides != spec.strides:
        raise InputError(f"The model's config gives strides {list(strides)} and not {list(spec.strides)}.")
    return UltralyticsDetector(spec, layers)


def spec_from_config(source: str | Path | Mapping[str, Any], names: Sequence[str] | None = None) -> ModelSpec:
    """Make the spec of an ultralytics architecture.

    Args:
        source: A name with its scale ("yolov8n", "yolo11n"), the path of a model YAML, or its content.
        names: Class names; by default "0", "1", ... for the config's number of classes.

    Raises:
        InputError: There is no such config, or it is not one of a detection model.
    """
    config = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else read_config(source)
    check_config(config)
    if names is None:
        names = [str(i) for i in range(config["nc"])]
    config["nc"] = len(names)
    _, strides = _build_layers(config, len(names))
    return ModelSpec("ultralytics", config, tuple(names), strides)


def _build_layers(config: Mapping[str, Any], classes: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Let ultralytics build the layers; returns them with the strides of the head's levels."""
    check_config(config)
    if config["nc"] != classes:
        raise InputError(f"The model's config has nc={config['nc']} but {classes} class names.")
    import_ultralytics()
    tasks: Any = importlib.import_module("ultralytics.nn.tasks")
    activation = tasks.Conv.default_act
    try:
        model = tasks.DetectionModel(copy.deepcopy(dict(config)), ch=3, verbose=False)
    except _UNBUILDABLE as error:
        # ultralytics sets a config's activation for the whole process and resets it on success alone.
        tasks.Conv.default_act = activation
        raise InputError(f"ultralytics cannot build the model's config ({error}).") from error
    return model.model, tuple(int(stride) for stride in model.stride.tolist())
