"""The anchor-based YOLOv5 detector (releases 6 and 7), built from the YAML inside its checkpoint."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import Detector, ModelSpec
from qyolo_deploy.models.decode import AnchorDecode
from qyolo_deploy.models.yolov5_blocks import Concat, DetectConvs, anchors_in_pixels, build_layers
from qyolo_deploy.models.yolov5_loss import anchor_loss

_STRIDE_PROBE = 256  # pixels a side, a multiple of every stride


class Yolov5Core(nn.Module):
    """The layers of a YOLOv5 YAML from the image to the head's raw maps, with the official tensor names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        layers, self._sources = build_layers(config)
        self.model = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return one raw map a level for images float32 `[N, 3, H, W]` in 0..1."""
        outputs: list[Any] = []
        x: Any = images
        for layer, sources in zip(self.model, self._sources, strict=True):
            if sources is not None:
                x = [outputs[i] for i in sources]
                if len(x) == 1 and not isinstance(layer, Concat | DetectConvs):
                    x = x[0]
            x = layer(x)
            outputs.append(x)
        maps: tuple[Tensor, ...] = x
        return maps


class Yolov5Detector(Detector):
    """YOLOv5 with an anchor head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.core = Yolov5Core(spec.config)
        head = self.core.model[-1]
        anchors = anchors_in_pixels(spec.config)
        assert isinstance(head, DetectConvs)
        if not len(head.m) == len(spec.strides) == len(anchors):
            raise InputError(
                f"The model has {len(head.m)} head levels but {len(spec.strides)} strides and "
                f"anchors for {len(anchors)}."
            )
        self.decode = AnchorDecode(anchors, spec.strides)
        _initialise_head(head, spec)

    def loss(self, raw_maps: Sequence[Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of YOLOv5's training: CIoU, and cross-entropy of objectness and classes.

        Its gains are the published ones. The core may meanwhile be a quantized graph, since nothing but
        the maps is used.
        """
        assert isinstance(self.decode, AnchorDecode)
        return anchor_loss(raw_maps, batch, self.decode.anchors, self.spec.strides)


def build_yolov5(spec: ModelSpec) -> Yolov5Detector:
    """Build a freshly initialised YOLOv5.

    Raises:
        InputError: The config names a layer or argument that this architecture does not have.
    """
    classes = spec.config.get("nc")
    if classes != len(spec.names):
        raise InputError(f"The model's config has nc={classes} but {len(spec.names)} class names.")
    return Yolov5Detector(spec)


def spec_from_yolov5_config(config: Mapping[str, Any], names: Sequence[str] | None = None) -> ModelSpec:
    """Make the spec of a YOLOv5 model YAML; without names the classes are called "0", "1", ...

    Raises:
        InputError: The config is not that of a YOLOv5 detection model.
    """
    if names is not None:
        config = {**config, "nc": len(names)}
    core = Yolov5Core(config).eval()
    try:
        with torch.no_grad():
            maps = core(torch.zeros(1, 3, _STRIDE_PROBE, _STRIDE_PROBE))
    except (RuntimeError, TypeError) as error:
        raise InputError("The layers of the model's config do not fit together.") from error
    names = names or [str(i) for i in range(config["nc"])]
    return ModelSpec("yolov5", dict(config), tuple(names), tuple(_STRIDE_PROBE // raw.shape[-1] for raw in maps))


def _initialise_head(head: DetectConvs, spec: ModelSpec) -> None:
    """Set the biases for about 8 objects in an image of 640 px (the prior of RetinaNet, 3.3)."""
    classes = len(spec.names)
    for conv, stride in zip(head.m, spec.strides, strict=True):
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        with torch.no_grad():
            bias = conv.bias.view(-1, 5 + classes)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (classes - 0.99999))
