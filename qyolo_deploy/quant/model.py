"""`QuantizedModel`: the integers that training, correction and calibration end in, readable without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.errors import InputError
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import REDUCED_BITS, QuantSpec

FORMAT_VERSION = 1
_INT32_LIMIT = 2**31 - 1


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """One convolution as integers, batch normalisation folded in.

    Args:
        weight: int8 `[C_out, C_in / groups, kH, kW]`, inside the grid of `qparams`.
        qparams: Weight scales, per channel along axis 0.
        bias: int32 `[C_out]`; its scale is `input scale * weight scale[c]`, its zero point 0.
        input: Name of the activation that the layer reads.
    """

    weight: NDArray[np.int8]
    qparams: QParams
    bias: NDArray[np.int32]
    input: str

    def __post_init__(self) -> None:
        channels = len(self.weight)
        if self.weight.dtype != np.int8 or self.weight.ndim != 4:
            raise InputError(f"weight is {self.weight.dtype} {self.weight.shape}, expected int8 of 4 dimensions")
        if self.qparams.scale.shape != (channels,) or self.bias.shape != (channels,):
            raise InputError(
                f"{channels} output channels with {self.qparams.scale.shape} scales and {self.bias.shape} biases"
            )
        spec = self.qparams.spec
        if self.weight.size and (self.weight.min() < spec.qmin or self.weight.max() > spec.qmax):
            raise InputError(f"a weight lies outside [{spec.qmin}, {spec.qmax}]")
        if self.bias.dtype != np.int32:
            raise InputError(f"bias is {self.bias.dtype}, expected int32")


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """Integer weights, biases and activation parameters of a whole detector.

    Args:
        architecture: The `ModelSpec` as data, from which the float network is built again.
        layers: Convolution name -> integers.
        activations: Tensor name -> its parameters, for every tensor that is quantized.
        float_tensors: What stays in float (`<layer>.weight`, `<layer>.bias`), batch normalisation folded.
        scheme: Short name of the bits, as in `w4a8`.
        lineage: Where the model comes from: digests of checkpoint, data and recipe.
    """

    architecture: Mapping[str, Any]
    layers: Mapping[str, QuantizedLayer]
    activations: Mapping[str, QParams]
    float_tensors: Mapping[str, NDArray[np.float32]]
    scheme: str
    lineage: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            if layer.input not in self.activations:
                raise InputError(f"layer '{name}' reads '{layer.input}', which is not quantized")

    def bias_scale(self, layer: str) -> NDArray[np.float32]:
        """Scale of a layer's int32 bias: input scale times weight scale, float32 `[C_out]`."""
        entry = self.layers[layer]
        return self.activations[entry.input].scale * entry.qparams.scale

    @property
    def wide_layers(self) -> tuple[str, ...]:
        """Layers whose weights are too large for processors that add two products with uint8 in 16 bits."""
        limit = 1 << (REDUCED_BITS - 1)
        return tuple(name for name, layer in self.layers.items() if np.abs(layer.weight.astype(np.int16)).max() > limit)

    def save(self, path: Path) -> None:
        """Writes safetensors with all non-tensor data as JSON under one key, byte for byte reproducible."""
        write_atomic(path, save(self._tensors(), {"qyolo": json.dumps(self._header(), sort_keys=True)}))

    def _tensors(self) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {}
        for name, layer in self.layers.items():
            tensors[f"weight/{name}"] = layer.weight
            tensors[f"weight_scale/{name}"] = layer.qparams.scale
            tensors[f"bias/{name}"] = layer.bias
        for name, qparams in self.activations.items():
            tensors[f"scale/{name}"] = qparams.scale
            tensors[f"zero_point/{name}"] = qparams.zero_point
        tensors |= {f"float/{name}": value for name, value in self.float_tensors.items()}
        return {name: np.asarray(value, order="C") for name, value in tensors.items()}

    def _header(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "architecture": self.architecture,
            "scheme": self.scheme,
            "lineage": dict(self.lineage),
            "layers": {
                name: {"input": layer.input, "weight": layer.qparams.spec.to_json()}
                for name, layer in self.layers.items()
            },
            "activations": {name: qparams.spec.to_json() for name, qparams in self.activations.items()},
        }

    @classmethod
    def load(cls, path: Path) -> "QuantizedModel":
        """Reads what `save` wrote.

        Raises:
            InputError: If the file is not such a file, or tensors are missing, unknown or of a wrong shape.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads(metadata["qyolo"])
            if header["format_version"] != FORMAT_VERSION:
                raise InputError(f"format_version is {header['format_version']}, expected {FORMAT_VERSION}")
            model = _from_parts(header, tensors)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a quantized model of this package ({error})") from error
        if tensors:
            raise InputError(f"{path}: unknown tensor '{sorted(tensors)[0]}'")
        return model


def _from_parts(header: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> QuantizedModel:
    """Builds the model and takes from `tensors` what it uses."""
    layers = {
        name: QuantizedLayer(
            weight=tensors.pop(f"weight/{name}"),
            qparams=QParams.of(QuantSpec(**entry["weight"]), tensors.pop(f"weight_scale/{name}")),
            bias=tensors.pop(f"bias/{name}"),
            input=entry["input"],
        )
        for name, entry in header["layers"].items()
    }
    activations = {
        name: QParams(QuantSpec(**spec), tensors.pop(f"scale/{name}"), tensors.pop(f"zero_point/{name}"))
        for name, spec in header["activations"].items()
    }
    floats = {name.removeprefix("float/"): tensors.pop(name) for name in sorted(tensors) if name.startswith("float/")}
    return QuantizedModel(header["architecture"], layers, activations, floats, header["scheme"], header["lineage"])


def quantize_bias(bias: NDArray[np.float64], scale: NDArray[np.float32]) -> NDArray[np.int32]:
    """Rounds a bias onto the grid of the int32 accumulator.

    Args:
        bias: float64 `[C_out]`.
        scale: float32 `[C_out]`, input scale times weight scale.

    Raises:
        InputError: If a bias does not fit into int32.
    """
    integers = np.rint(bias / scale.astype(np.float64))
    if not np.abs(integers).max(initial=0) <= _INT32_LIMIT:  # so that NaN is refused too
        raise InputError("a bias does not fit the int32 accumulator: its channel's scale is too small")
    return integers.astype(np.int32)
