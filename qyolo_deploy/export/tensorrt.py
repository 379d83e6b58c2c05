"""The dialect of QDQ ONNX that TensorRT builds int8 kernels from.

TensorRT takes int8 with zero point 0 alone, float biases, and no integers between Q and DQ. A grid of a
`QuantizedModel` has a zero point; seen from it, its codes are `q - z`, in `[qmin - z, qmax - z]`:

* where that lies inside -128..127, the same numbers come from int8 with the same scale and zero point 0. Ends that the
  container does not saturate at are kept by a Clip of the values, which TensorRT fuses into the kernel before;
* where it does not, as with 8 bits behind SiLU (-20..235), but all readers are convolutions without padding, the values
  are shifted until their middle code is 0, and the biases of the readers make up for it: nothing is lost either;
* where a reader pads with zeros, which are no zeros of the shifted values, or adds, the range is kept and the step
  becomes coarser;
* an image of 8 bits would lose half of its levels, so its convolution computes in float, with the integers' values;
* raw head maps, which no convolution reads, are clipped to their range and not rounded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qyolo_deploy.export.intervals import bounds, unclipped_low
from qyolo_deploy.export.qdq import clip_values, insert_qdq
from qyolo_deploy.export.tensorrt_passes import compute_in_half, shift_values, without_padding
from qyolo_deploy.graph.trace import INPUT
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantSpec

_INT8 = QuantSpec(8, signed=True)
_CHOOSING = ("Concat", "MaxPool", "Resize")


@dataclass(frozen=True)
class Dialect:
    """A graph for TensorRT, and what it does otherwise than training did.

    Args:
        model: The graph.
        tensors: How many activations it rounds.
        coarser: Tensor name -> its step as a multiple of the trained one, for those that lost levels.
        shifted: Tensors whose middle code became 0.
        float_layers: Quantized layers that compute in float.
        clips: How many tensors are kept on their grid by a Clip.
    """

    model: ir.Model
    tensors: int
    coarser: Mapping[str, float]
    shifted: tuple[str, ...]
    float_layers: tuple[str, ...]
    clips: int


def tensorrt_dialect(
    model: ir.Model, quantized: QuantizedModel, inner: frozenset[str] = frozenset(), fp16: bool = False
) -> Dialect:
    """Makes the graph; the float model is left as it is.

    Args:
        model: From `export_float`.
        quantized: Integers, scales and zero points.
        inner: Tensors inside activations, which are clipped to their grid's range but not rounded: TensorRT makes one
            kernel of convolution, activation and rounding.
        fp16: Convolutions that stay float compute in half precision.

    Raises:
        InputError: If the graph does not have a tensor of the quantized model.
    """
    left_out = inner | _stays_float(model, quantized)
    rounded = {name: grid for name, grid in quantized.activations.items() if name not in left_out}
    shifts = {
        name: middle_value(rounded[name])
        for name in without_padding(model, quantized, {name for name, grid in rounded.items() if not fits_int8(grid)})
    }
    grids = {name: to_symmetric(grid) for name, grid in rounded.items()}
    grids |= {name: QParams.of(_INT8, rounded[name].scale) for name in shifts}
    symmetric = _on_grids(quantized, grids)
    result = insert_qdq(model, symmetric, clip="values", float_biases=float_biases(quantized, shifts))
    sources = _sources(model, grids)
    clipped = [name for name in quantized.activations if name in left_out and name in quantized.layers]
    clipped += _clipped(model, {name: grid for name, grid in rounded.items() if name not in shifts})
    for name in clipped:
        clip_values(result.graph, name, quantized.activations[name])
    for name in sources & set(shifts):
        shift_values(result.graph, name, shifts[name])
    result.graph.sort()
    if fp16:
        compute_in_half(result.graph, {key.rpartition(".")[0] for key in symmetric.float_tensors})
    return Dialect(
        result,
        len(grids),
        _coarser(quantized, grids),
        tuple(shifts),
        tuple(name for name in quantized.layers if name not in symmetric.layers),
        len(clipped),
    )


def fits_int8(grid: QParams) -> bool:
    """Whether int8 with zero point 0 and the same scale holds all values of a grid."""
    low, high = _steps(grid)
    return low >= _INT8.qmin and high <= _INT8.qmax


def to_symmetric(grid: QParams) -> QParams:
    """The int8 grid with zero point 0 and the finest step, but none finer than the trained one, that holds a range."""
    low, high = _steps(grid)
    ratio = 1.0 if fits_int8(grid) else max(low / _INT8.qmin, high / _INT8.qmax)
    return QParams.of(_INT8, np.float32(float(grid.scale) * ratio))


def middle_value(grid: QParams) -> float:
    """What an 8-bit grid's middle code stands for: subtracted, its codes become those of int8 with zero point 0."""
    return float(grid.scale) * (grid.spec.qmin - int(grid.zero_point) - _INT8.qmin)


def _steps(grid: QParams) -> tuple[int, int]:
    """Ends of a grid in steps from zero."""
    return grid.spec.qmin - int(grid.zero_point), grid.spec.qmax - int(grid.zero_point)


def _stays_float(model: ir.Model, quantized: QuantizedModel) -> frozenset[str]:
    """Tensors that would lose levels and need not: the image, and what no quantized layer comes after."""
    followed: set[str] = set()
    for node in reversed(list(model.graph)):
        results = {str(value.name) for value in node.outputs}
        if results & (followed | set(quantized.layers)):
            followed |= {str(value.name) for value in node.inputs if value is not None}
    return frozenset(
        name
        for name, grid in quantized.activations.items()
        if (name == INPUT or name not in followed) and not fits_int8(grid)
    )


def _coarser(quantized: QuantizedModel, grids: Mapping[str, QParams]) -> dict[str, float]:
    ratios = {name: float(grid.scale / quantized.activations[name].scale) for name, grid in grids.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio != 1}


def float_biases(
    quantized: QuantizedModel, shifts: Mapping[str, float] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Biases of all layers, float32 `[C_out]`; of those that read shifted values with what the shift takes away."""
    biases = {}
    for name, layer in quantized.layers.items():
        bias = layer.bias * quantized.bias_scale(name).astype(np.float64)
        sums = layer.weight.sum(axis=(1, 2, 3), dtype=np.int64) * layer.qparams.scale.astype(np.float64)
        biases[name] = (bias + (shifts or {}).get(layer.input, 0.0) * sums).astype(np.float32)
    return biases


def _on_grids(quantized: QuantizedModel, grids: Mapping[str, QParams]) -> QuantizedModel:
    """The model with these grids alone; layers whose input has none become float."""
    layers = {name: layer for name, layer in quantized.layers.items() if layer.input in grids}
    floats, biases = dict(quantized.float_tensors), float_biases(quantized)
    for name, layer in quantized.layers.items():
        if name not in layers:
            floats[f"{name}.weight"] = layer.qparams.dequantize(layer.weight)
            floats[f"{name}.bias"] = biases[name]
    return replace(quantized, activations=grids, layers=layers, float_tensors=floats)


def _sources(model: ir.Model, names: Iterable[str]) -> set[str]:
    """Tensors that are computed, not chosen among values that are on the same grid already."""
    makers = {str(value.name): node.op_type for node in model.graph for value in node.outputs}
    return {name for name in names if makers.get(name) not in _CHOOSING}


def _clipped(model: ir.Model, grids: Mapping[str, QParams]) -> list[str]:
    """Rounded tensors that int8 does not keep inside their grid.

    Nothing falls below the lower end where the intervals prove it, as behind SiLU.
    """
    intervals, sources = bounds(model.graph, grids), _sources(model, grids)
    clipped = []
    for name, grid in grids.items():
        low, high = _steps(grid)
        keeps_low = low <= _INT8.qmin or unclipped_low(intervals[name], grid) >= grid.spec.qmin
        if name in sources and not (keeps_low and high >= _INT8.qmax):
            clipped.append(name)
    return clipped
