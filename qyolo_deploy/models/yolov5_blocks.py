"""The blocks of YOLOv5 (releases 6 and 7) and the table that turns a model YAML's rows into them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import parse_activation

DEFAULT_ACTIVATION = "nn.SiLU()"
_CONFIG_TYPES: dict[str, type | tuple[type, ...]] = {
    "nc": int,
    "depth_multiple": (int, float),
    "width_multiple": (int, float),
    "anchors": list,
    "backbone": list,
    "head": list,
}


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
        activation: str = DEFAULT_ACTIVATION,
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
    """Cross-stage partial block: bottlenecks on one half, a bypass on the other, then joined."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        repeats: int = 1,
        shortcut: bool = True,
        *,
        activation: str = DEFAULT_ACTIVATION,
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

    def __init__(self, c_in: int, c_out: int, kernel: int = 5, *, activation: str = DEFAULT_ACTIVATION) -> None:
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


def _divisible(channels: float, divisor: int = 8) -> int:
    return math.ceil(channels / divisor) * divisor


def build_layers(config: Mapping[str, Any]) -> tuple[list[nn.Module], list[list[int] | None]]:
    """Build the layers of a YOLOv5 YAML, scaled by its depth and width multiples.

    Returns:
        The layers and, for each, the indices of the outputs that it reads (None: the previous one).

    Raises:
        InputError: A key is missing, or a row is not one that this architecture has.
    """
    for key, kind in _CONFIG_TYPES.items():
        if not isinstance(config.get(key), kind) or not config[key]:
            raise InputError(f"The model's config is not a YOLOv5: its key '{key}' is missing or unusable.")
    if config.get("ch", 3) != 3:
        raise InputError("The model's config takes other images than those with three channels.")
    outputs = len(anchors_in_pixels(config)[0]) // 2 * (5 + config["nc"])
    layers: list[nn.Module] = []
    sources: list[list[int] | None] = []
    channels: list[int] = []
    for index, row in enumerate([*config["backbone"], *config["head"]]):
        source, repeats, name, arguments = _parse_row(row, index)
        inputs = [channels[i] for i in source] if index else [3]
        try:
            layer, c_out = _build_layer(name, arguments, inputs, repeats, config, outputs)
        except (IndexError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"Layer {index} of the model's config ({name}) has arguments {arguments} that do not fit."
            ) from error
        reads_several = isinstance(layer, Concat | DetectConvs)
        layers.append(layer)
        sources.append(None if source == [index - 1] and not reads_several else source)
        channels.append(c_out)
    if [isinstance(layer, DetectConvs) for layer in layers] != [False] * (len(layers) - 1) + [True]:
        raise InputError("The last layer of the model's config, and that alone, must be Detect.")
    return layers, sources


def anchors_in_pixels(config: Mapping[str, Any]) -> list[list[float]]:
    """Return a config's anchors, level by level, as flat width, height lists.

    Raises:
        InputError: They are not as many positive pairs on each level.
    """
    anchors = config.get("anchors")
    lengths = {len(row) if isinstance(row, list) else 0 for row in anchors} if isinstance(anchors, list) else set()
    if len(lengths) != 1 or (length := lengths.pop()) < 2 or length % 2:
        raise InputError("The key 'anchors' of the model's config must list as many width, height pairs a level.")
    assert isinstance(anchors, list)
    if not all(isinstance(value, int | float) and value > 0 for row in anchors for value in row):
        raise InputError("The anchors of the model's config must be positive numbers of pixels.")
    return anchors


def _parse_row(row: Any, index: int) -> tuple[list[int], int, str, list[Any]]:
    """Split one row `[from, repeats, name, arguments]`; negative sources count back from the row."""
    try:
        source, repeats, name, arguments = row
        absolute = [i if i >= 0 else index + i for i in (source if isinstance(source, list) else [source])]
    except (TypeError, ValueError) as error:
        raise InputError(f"Layer {index} of the config is not [from, repeats, name, arguments].") from error
    known = absolute == [-1] if index == 0 else absolute and all(0 <= i < index for i in absolute)
    if not (known and isinstance(repeats, int) and isinstance(name, str) and isinstance(arguments, list)):
        raise InputError(f"Layer {index} of the config is not [from, repeats, name, arguments].")
    return absolute, repeats, name, arguments


def _build_layer(
    name: str,
    arguments: list[Any],
    inputs: list[int],
    repeats: int,
    config: Mapping[str, Any],
    head_outputs: int,
) -> tuple[nn.Module, int]:
    """Make one layer and return it with its output channels."""
    if name in ("Conv", "C3", "SPPF"):
        return _build_block(name, arguments, inputs[0], repeats, config)
    if name == "nn.Upsample":
        size, factor, mode = arguments
        if size not in (None, "None") or mode != "nearest":
            raise ValueError(arguments)
        return nn.Upsample(scale_factor=float(factor), mode="nearest"), inputs[0]
    if name == "Concat":
        if arguments != [1]:
            raise ValueError(arguments)
        return Concat(), sum(inputs)
    if name == "Detect":
        return DetectConvs(inputs, head_outputs), head_outputs
    raise InputError(
        f"The model's config has a layer '{name}', which YOLOv5 of releases 6 and 7 does not detect with.",
        hint="Known layers: Conv, C3, SPPF, nn.Upsample, Concat, Detect.",
    )


def _build_block(
    name: str, arguments: list[Any], c_in: int, repeats: int, config: Mapping[str, Any]
) -> tuple[nn.Module, int]:
    """Make a scaled block: its width by the width multiple, its repeats (if any) by the depth multiple."""
    activation = config.get("activation") or DEFAULT_ACTIVATION
    c_out, rest = _divisible(arguments[0] * config["width_multiple"]), arguments[1:]
    if repeats > 1:
        repeats = max(round(repeats * config["depth_multiple"]), 1)
    if name == "C3":
        return C3(c_in, c_out, repeats, *rest, activation=activation), c_out
    block = Conv if name == "Conv" else SPPF
    blocks = [block(c_out if i else c_in, c_out, *rest, activation=activation) for i in range(repeats)]
    return (blocks[0] if repeats == 1 else nn.Sequential(*blocks)), c_out
