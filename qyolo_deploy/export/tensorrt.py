"""The dialect of QDQ ONNX that TensorRT builds int8 kernels from.

TensorRT takes int8 with zero point 0 alone, float biases, and no integers between Q and DQ. A grid of a `QuantizedModel`
has a zero point; seen from it, its codes are `q - z`, in `[qmin - z, qmax - z]`:

* where that lies inside -128..127, the same numbers come from int8 with the same scale and zero point 0. Ends that the
  container does not saturate at are kept by a Clip of the values, which TensorRT fuses into the kernel before;
* where it does not, as with 8 bits behind SiLU (-20..235), the range is kept and the step becomes coarser;
* an image of 8 bits would lose half of its levels, so its convolution computes in float, with the integers' values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qyolo_deploy.export.intervals import bounds, unclipped_low
from qyolo_deploy.export.qdq import clip_values, insert_qdq
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
        coarser: Tensor name -> its step as a multiple of the trained one, for those that lost levels.
        float_layers: Quantized layers that compute in float.
        clips: How many tensors are kept on their grid by a Clip.
    """

    model: ir.Model
    coarser: Mapping[str, float]
    float_layers: tuple[str, ...]
    clips: int


def tensorrt_dialect(model: ir.Model, quantized: QuantizedModel, inner: frozenset[str] = frozenset()) -> Dialect:
    """Makes the graph; the float model is left as it is.

    Args:
        model: From `export_float`.
        quantized: Integers, scales and zero points.
        inner: Tensors inside activations, which are clipped to their grid's range but not rounded: TensorRT makes one
            kernel of convolution, activation and rounding.

    Raises:
        InputError: If the graph does not have a tensor of the quantized model.
    """
    symmetric = _symmetric(quantized, inner | _heads(model, quantized))
    biases = {
        name: (layer.bias * quantized.bias_scale(name).astype(np.float64)).astype(np.float32)
        for name, layer in quantized.layers.items()
    }
    result = insert_qdq(model, symmetric, clip="values", float_biases=biases)
    clipped = _clipped(model, quantized, inner, frozenset(symmetric.activations))
    for name in clipped:
        clip_values(result.graph, name, quantized.activations[name])
    result.graph.sort()
    ratios = {name: float(grid.scale / quantized.activations[name].scale) for name, grid in symmetric.activations.items()}
    return Dialect(
        result,
        {name: ratio for name, ratio in ratios.items() if ratio != 1},
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


def _steps(grid: QParams) -> tuple[int, int]:
    """Ends of a grid in steps from zero."""
    return grid.spec.qmin - int(grid.zero_point), grid.spec.qmax - int(grid.zero_point)


def _heads(model: ir.Model, quantized: QuantizedModel) -> frozenset[str]:
    """Tensors that lose levels for nobody's gain, since no quantized layer comes after them: the raw head maps."""
    followed: set[str] = set()
    for node in reversed(list(model.graph)):
        results = {str(value.name) for value in node.outputs}
        if results & (followed | set(quantized.layers)):
            followed |= {str(value.name) for value in node.inputs if value is not None}
    return frozenset(
        name for name, grid in quantized.activations.items() if name not in followed and not fits_int8(grid)
    )


def _symmetric(quantized: QuantizedModel, inner: frozenset[str]) -> QuantizedModel:
    """The model on int8 grids, without what TensorRT is not to round."""
    left_out = inner | {name for name, grid in quantized.activations.items() if name == INPUT and not fits_int8(grid)}
    activations = {name: to_symmetric(grid) for name, grid in quantized.activations.items() if name not in left_out}
    layers = {name: layer for name, layer in quantized.layers.items() if layer.input in activations}
    floats = dict(quantized.float_tensors)
    for name, layer in quantized.layers.items():
        if name not in layers:
            floats[f"{name}.weight"] = layer.qparams.dequantize(layer.weight)
            floats[f"{name}.bias"] = (layer.bias * quantized.bias_scale(name).astype(np.float64)).astype(np.float32)
    return replace(quantized, activations=activations, layers=layers, float_tensors=floats)


def _clipped(
    model: ir.Model, quantized: QuantizedModel, inner: frozenset[str], rounded: frozenset[str]
) -> list[str]:
    """Tensors that int8 does not keep inside their grid.

    Those that only choose among values of their own grid stay on it. Nothing falls below the lower end where the
    intervals prove it, as behind SiLU.
    """
    makers = {value.name: node.op_type for node in model.graph for value in node.outputs}
    grids = {name: grid for name, grid in quantized.activations.items() if name in rounded}
    intervals = bounds(model.graph, grids)
    clipped = [name for name in quantized.activations if name in inner and name in quantized.layers]
    for name, grid in grids.items():
        low, high = _steps(grid)
        keeps_high = high >= _INT8.qmax
        keeps_low = low <= _INT8.qmin or unclipped_low(intervals[name], grid) >= grid.spec.qmin
        if makers.get(name) not in _CHOOSING and not (keeps_low and keeps_high):
            clipped.append(name)
    return clipped
