"""The anchor-based YOLOv5 detector (releases 6 and 7), built from the YAML inside its checkpoint."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import Detector, ModelSpec, cell_offsets, parse_activation

_DEFAULT_ACTIVATION = "nn.SiLU()"
_STRIDE_PROBE = 256  # pixels a side, a multiple of every stride


class Conv(nn.Module):
    """Convolution without bias, BatchNorm and activation; "same" padding for odd kernels."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        *,
        activation: str = _DEFAULT_ACTIVATION,
    ) -> None:
        super().__init__()
        pad = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, pad, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.03)
        self.act = parse_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 `[N, c_out, H / stride, W / stride]`."""
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution with an optional residual connection."""

    def __init__(self, channels: int, shortcut: bool, activation: str) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels, 1, activation=activation)
        self.cv2 = Conv(channels, channels, 3, activation=activation)
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        out: Tensor = self.cv2(self.cv1(x))
        return x + out if self.add else out


class C3(nn.Module):
    """Cross-stage partial block: bottlenecks on one half, a bypass on the other, joined by a 1x1 convolution."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        repeats: int = 1,
        shortcut: bool = True,
        *,
        activation: str = _DEFAULT_ACTIVATION,
    ) -> None:
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden, activation=activation)
        self.cv2 = Conv(c_in, hidden, activation=activation)
        self.cv3 = Conv(2 * hidden, c_out, activation=activation)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut, activation) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 `[N, c_out, H, W]`."""
        out: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return out


class SPPF(nn.Module):
    """Spatial pyramid pooling as three pools in a row: the sizes 5, 9 and 13 at the cost of 5."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 5, *, activation: str = _DEFAULT_ACTIVATION
    ) -> None:
        super().__init__()
        hidden = c_in // 2
        self.cv1 = Conv(c_in, hidden, activation=activation)
        self.cv2 = Conv(4 * hidden, c_out, activation=activation)
        self.m = nn.MaxPool2d(kernel, stride=1, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 `[N, c_out, H, W]`."""
        once = self.cv1(x)
        twice = self.m(once)
        thrice = self.m(twice)
        out: Tensor = self.cv2(torch.cat((once, twice, thrice, self.m(thrice)), 1))
        return out


class Concat(nn.Module):
    """Concatenation of several layers' outputs along the channels."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return float32 `[N, sum of channels, H, W]`."""
        return torch.cat(tuple(inputs), 1)


class DetectConvs(nn.Module):
    """The head's last 1x1 convolutions, one a level, with `anchors * (5 + nc)` outputs each."""

    def __init__(self, channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.m = nn.ModuleList(nn.Conv2d(c, outputs, 1) for c in channels)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the raw maps, float32 `[N, anchors * (5 + nc), h, w]` each."""
        return tuple(conv(x) for conv, x in zip(self.m, inputs, strict=True))


class Yolov5Core(nn.Module):
    """The layers of a YOLOv5 YAML from the image to the head's raw maps, with the official tensor names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        layers, self._sources = _build_layers(config)
        self.model = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return one raw map a level for images float32 `[N, 3, H, W]` in 0..1."""
        outputs: list[Any] = []
        x: Any = images
        for layer, sources in zip(self.model, self._sources, strict=True):
            if sources is not None:
                x = [outputs[i] for i in sources]
                if len(x) == 1 and not isinstance(layer, (Concat, DetectConvs)):
                    x = x[0]
            x = layer(x)
            outputs.append(x)
        maps: tuple[Tensor, ...] = x
        return maps


class AnchorDecode(nn.Module):
    """Raw maps to boxes and scores, with the anchors in the order (level, anchor, y, x).

    With s the sigmoid of a cell's outputs, g its column and row, t the level's stride and a the anchor
    in pixels: `xy = (2 s - 0.5 + g) t`, `wh = (2 s)^2 a`, `score = objectness * class` (YOLOv5).
    The levels are laid side by side by slicing channels, so that the exported graph has no transpose.
    """

    anchors: Tensor

    def __init__(self, anchors: Sequence[Sequence[float]], strides: Sequence[int]) -> None:
        super().__init__()
        pixels = torch.tensor(anchors, dtype=torch.float32).reshape(len(strides), -1, 2)
        self.register_buffer("anchors", pixels, persistent=False)
        self.strides = tuple(strides)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return `output0`, float32 `[N, 4 + nc, A]`, for raw maps `[N, anchors * (5 + nc), h, w]`."""
        count = self.anchors.shape[1]
        slabs, offsets, scales, sizes = [], [], [], []
        grids = cell_offsets(maps, -0.5)
        for level, (raw, grid, stride) in enumerate(zip(maps, grids, self.strides, strict=True)):
            batch, channels, height, width = raw.shape
            rows = channels // count
            for anchor in range(count):
                slab = raw[:, anchor * rows : (anchor + 1) * rows]
                slabs.append(slab.reshape(batch, rows, height * width))
                offsets.append(grid * stride)
                scales.append(torch.full_like(grid[:1], 2.0 * stride))
                sizes.append(4.0 * self.anchors[level, anchor].reshape(2, 1).expand_as(grid))
        s = torch.cat(slabs, 2).sigmoid()
        xy = s[:, 0:2] * torch.cat(scales, 1) + torch.cat(offsets, 1)
        wh = s[:, 2:4] * s[:, 2:4] * torch.cat(sizes, 1)
        return torch.cat((xy, wh, s[:, 5:] * s[:, 4:5]), 1)


class Yolov5Detector(Detector):
    """YOLOv5 with an anchor head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        anchors = _anchors(spec.config, len(spec.strides))
        self.spec = spec
        self.core = Yolov5Core(spec.config)
        self.decode = AnchorDecode(anchors, spec.strides)
        head = self.core.model[-1]
        assert isinstance(head, DetectConvs)
        if len(head.m) != len(spec.strides):
            raise InputError(f"The model's head has {len(head.m)} levels but {len(spec.strides)} strides.")
        _initialise_head(head, spec)

    def loss(
        self, raw_maps: Sequence[Tensor], batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Refuse: this family has no label loss yet.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "YOLOv5 with an anchor head trains by distillation from its float model; it has no label loss yet.",
            hint="Choose a distillation loss in the recipe's train section.",
        )


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
    classes = config.get("nc")
    if names is None:
        if not isinstance(classes, int) or classes < 1:
            raise InputError("The key 'nc' of the model's config must be a positive number of classes.")
        names = [str(i) for i in range(classes)]
    config = {**config, "nc": len(names)}
    core = Yolov5Core(config).eval()
    with torch.no_grad():
        maps = core(torch.zeros(1, int(config.get("ch", 3)), _STRIDE_PROBE, _STRIDE_PROBE))
    return ModelSpec("yolov5", config, tuple(names), tuple(_STRIDE_PROBE // raw.shape[-1] for raw in maps))


def _anchors(config: Mapping[str, Any], levels: int) -> list[list[float]]:
    """Return the anchors in pixels, level by level, as flat width, height lists."""
    anchors = config.get("anchors")
    if not isinstance(anchors, list) or len(anchors) != levels:
        raise InputError(f"The model's config must list anchors for {levels} levels, in pixels.")
    lengths = {len(row) if isinstance(row, list) else 0 for row in anchors}
    if len(lengths) != 1 or (length := lengths.pop()) < 2 or length % 2:
        raise InputError(
            "The anchors of the model's config must be as many width, height pairs on each level."
        )
    if not all(isinstance(value, (int, float)) and value > 0 for row in anchors for value in row):
        raise InputError("The anchors of the model's config must be positive numbers of pixels.")
    return anchors


def _initialise_head(head: DetectConvs, spec: ModelSpec) -> None:
    """Set the biases so that a fresh model predicts about 8 objects an image of 640 px (RetinaNet, sec. 3.3)."""
    classes = len(spec.names)
    for conv, stride in zip(head.m, spec.strides, strict=True):
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        with torch.no_grad():
            bias = conv.bias.view(-1, 5 + classes)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (classes - 0.99999))


def _divisible(channels: float, divisor: int = 8) -> int:
    return math.ceil(channels / divisor) * divisor


def _build_layers(config: Mapping[str, Any]) -> tuple[list[nn.Module], list[list[int] | None]]:
    """Return the layers and, for each, the indices of the outputs it reads (None: the previous one)."""
    try:
        rows = [*config["backbone"], *config["head"]]
        classes, depth, width = (config[key] for key in ("nc", "depth_multiple", "width_multiple"))
        anchors_per_level = len(config["anchors"][0]) // 2
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"The model's config is not that of a YOLOv5: the key {error} is not usable."
        ) from error
    activation = config.get("activation") or _DEFAULT_ACTIVATION
    layers: list[nn.Module] = []
    sources: list[list[int] | None] = []
    channels: list[int] = []
    outputs = anchors_per_level * (5 + classes)
    for index, row in enumerate(rows):
        source, repeats, kind, arguments = _parse_row(row, index)
        inputs = [channels[i] for i in source] if index else [int(config.get("ch", 3))]
        repeats = max(round(repeats * depth), 1) if repeats > 1 else repeats
        try:
            layer, c_out = _build_layer(kind, arguments, inputs, repeats, width, activation, outputs)
        except (TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"Layer {index} of the model's config ({kind}) has arguments {arguments} that do not fit."
            ) from error
        layers.append(layer)
        sources.append(
            None if source == [index - 1] and not isinstance(layer, (Concat, DetectConvs)) else source
        )
        channels.append(c_out)
    if not layers or not isinstance(layers[-1], DetectConvs):
        raise InputError("The last layer of the model's config is not Detect.")
    return layers, sources


def _parse_row(row: Any, index: int) -> tuple[list[int], int, str, list[Any]]:
    """Split one row `[from, repeats, name, arguments]`; negative sources count back from the row."""
    try:
        source, repeats, kind, arguments = row
        absolute = [i if i >= 0 else index + i for i in (source if isinstance(source, list) else [source])]
        valid = index == 0 or all(0 <= i < index for i in absolute)
        if not (valid and isinstance(repeats, int) and isinstance(kind, str) and isinstance(arguments, list)):
            raise ValueError(row)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Layer {index} of the model's config is not [from, repeats, name, arguments]."
        ) from error
    return absolute, repeats, kind, arguments


def _build_layer(
    kind: str,
    arguments: list[Any],
    inputs: list[int],
    repeats: int,
    width: float,
    activation: str,
    head_outputs: int,
) -> tuple[nn.Module, int]:
    """Make one layer and return it with its output channels."""
    if kind in ("Conv", "C3", "SPPF"):
        c_out, rest = _divisible(arguments[0] * width), arguments[1:]
        if kind == "C3":
            return C3(inputs[0], c_out, repeats, *rest, activation=activation), c_out
        block = Conv if kind == "Conv" else SPPF
        blocks = [
            block(inputs[0] if i == 0 else c_out, c_out, *rest, activation=activation) for i in range(repeats)
        ]
        return (blocks[0] if repeats == 1 else nn.Sequential(*blocks)), c_out
    if kind == "nn.Upsample":
        size, factor, mode = arguments
        if size not in (None, "None") or mode != "nearest":
            raise ValueError(arguments)
        return nn.Upsample(scale_factor=float(factor), mode="nearest"), inputs[0]
    if kind == "Concat":
        if arguments != [1]:
            raise ValueError(arguments)
        return Concat(), sum(inputs)
    if kind == "Detect":
        return DetectConvs(inputs, head_outputs), head_outputs
    raise InputError(
        f"The model's config has a layer '{kind}' that YOLOv5 detection models of releases 6 and 7 do not have.",
        hint="Known layers: Conv, C3, SPPF, nn.Upsample, Concat, Detect.",
    )
