"""What every detector architecture offers to training, quantization and export."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qyolo_deploy.errors import InputError

_ACTIVATION = re.compile(r"(?:torch\.)?nn\.(?P<name>\w+)\((?P<arguments>[-+\d.eE, ]*)\)")
_ACTIVATIONS = ("SiLU", "ReLU", "ReLU6", "LeakyReLU", "Hardswish", "Mish", "GELU", "Identity")


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to build an architecture again, as plain data.

    Attributes:
        family: Name of the builder: "yolov5" (anchors) or "ultralytics" (v5u, v8, 11, 12, 26, ...).
        config: The model's YAML as JSON-able data.
        names: Class names in the order of the score channels.
        strides: Pixels per cell of each head level, finest first.
    """

    family: str
    config: dict[str, Any]
    names: tuple[str, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise InputError("The model has no class names: expected at least one.")
        if not self.strides or any(stride < 1 for stride in self.strides):
            raise InputError(f"The strides {list(self.strides)} are not positive pixels per head level.")

    def to_json(self) -> dict[str, Any]:
        """Return the spec as a dict that `json.dumps` writes and `from_json` reads."""
        return {
            "family": self.family,
            "config": self.config,
            "names": list(self.names),
            "strides": list(self.strides),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelSpec":
        """Read what `to_json` gave.

        Raises:
            InputError: A key is missing, surplus or of another type.
        """
        expected = {"family": str, "config": dict, "names": list, "strides": list}
        if not isinstance(data, Mapping) or set(data) != set(expected):
            raise InputError(f"A model spec must have exactly the keys {', '.join(expected)}.")
        for key, kind in expected.items():
            if not isinstance(data[key], kind):
                raise InputError(f"The key '{key}' of a model spec must be a {kind.__name__}.")
        if not all(isinstance(name, str) for name in data["names"]):
            raise InputError("The key 'names' of a model spec must be a list of strings.")
        if not all(isinstance(stride, int) for stride in data["strides"]):
            raise InputError("The key 'strides' of a model spec must be a list of integers.")
        return cls(data["family"], data["config"], tuple(data["names"]), tuple(data["strides"]))


class Detector(nn.Module, ABC):
    """A detector in two parts: a quantizable core and a decode that stays float.

    Attributes:
        spec: What it was built from.
        core: float32 `[N, 3, H, W]` in 0..1 to a tuple of raw head maps, the outputs of the last head
            convolutions. Its parameters carry the official names (`model.0.conv.weight`), and torch.fx
            traces it with the modules of torch.nn as leaves.
        decode: That tuple to `output0`, float32 `[N, 4 + nc, A]`: xywh in pixels, then scores after the
            sigmoid; for anchor heads a score is objectness times class probability.
        not_taken: Tensors that a given checkpoint did not fill and that are freshly initialised.
    """

    spec: ModelSpec
    core: nn.Module
    decode: nn.Module
    not_taken: tuple[str, ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        """Return `output0` for images float32 `[N, 3, H, W]` in 0..1."""
        output: Tensor = self.decode(self.core(images))
        return output

    @abstractmethod
    def loss(self, raw_maps: Sequence[Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Return the family's detection loss, summed and multiplied by the batch size, and its parts.

        Args:
            raw_maps: What `core` returned for `batch["img"]`.
            batch: ultralytics' batch: `img` `[N, 3, H, W]`, `cls` `[M, 1]`, `bboxes` `[M, 4]` (xywh as
                fractions of the image), `batch_idx` `[M]`.
        """


def parse_activation(text: str) -> nn.Module:
    """Make an activation from a model YAML's text such as `nn.LeakyReLU(0.1)` without evaluating it.

    Raises:
        InputError: The text is not one of the known activations with a plain number as its argument.
    """
    match = _ACTIVATION.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match["name"] not in _ACTIVATIONS:
        raise InputError(
            f"The activation {text!r} of the model's config is not known.",
            hint=f"Known are nn.X() with X one of {', '.join(_ACTIVATIONS)}.",
        )
    try:
        arguments = json.loads(f"[{match['arguments']}]")
        module: nn.Module = getattr(nn, match["name"])(*arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"The activation {text!r} of the model's config has arguments that do not fit.") from error
    return module
