"""Interval analysis: between which two numbers every value of an exported graph lies, whatever the image shows.

An interval may be too wide, never too narrow: what is said about its ends holds for every value.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qyolo_deploy.graph.trace import INPUT
from qyolo_deploy.quant.qparams import QParams

# Levels by which a value may be off before it is rounded. Kernels order float32 operations in their own ways, and
# approximate the exponential; on grids of at most 256 levels that stays some hundred times smaller.
MARGIN = 1e-3

_SILU_LOW = -0.2784645428  # x * sigmoid(x) at x = -1.2785
_HARD_SWISH_LOW = -0.375  # x * (x + 3) / 6 at x = -1.5
# These only choose among the values of their first input, or among all of them in the case of Concat.
_CHOOSING = frozenset(
    ["Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"]
)


@dataclass(frozen=True)
class Interval:
    """All numbers from `low` to `high`."""

    low: float
    high: float


_UNBOUNDED = Interval(-math.inf, math.inf)
_UNIT = Interval(0.0, 1.0)


def bounds(graph: ir.Graph, grids: Mapping[str, QParams]) -> dict[str, Interval]:
    """Intervals of all values as they are computed, before their own rounding.

    Args:
        graph: Float, from `export_float`; its input `images` is in 0..1.
        grids: Tensor name -> the grid onto which it is rounded before anything reads it.

    Returns:
        Value name -> interval.
    """
    raw: dict[str, Interval] = {}
    for value in graph.inputs:
        raw[str(value.name)] = _UNIT if value.name == INPUT else _UNBOUNDED
    for node in graph:
        result = _result(node, raw, grids)
        raw |= {str(value.name): result for value in node.outputs}
    return raw


def codes(interval: Interval, grid: QParams) -> tuple[int, int]:
    """The lowest and the highest integer onto which a number of the interval may be rounded."""
    spec = grid.spec
    low, high = unclipped_low(interval, grid), np.rint(interval.high / float(grid.scale) + MARGIN) + grid.zero_point
    return int(np.clip(low, spec.qmin, spec.qmax)), int(np.clip(high, spec.qmin, spec.qmax))


def unclipped_low(interval: Interval, grid: QParams) -> float:
    """The lowest integer that rounding may give if nothing clips it; -inf where there is none."""
    return float(np.rint(interval.low / float(grid.scale) - MARGIN) + grid.zero_point)


def _result(node: ir.Node, raw: Mapping[str, Interval], grids: Mapping[str, QParams]) -> Interval:
    if node.domain:
        return _UNBOUNDED
    if node.op_type == "Mul" and (source := _silu_source(node)) is not None:
        return _silu(source, node, raw, grids)
    if node.op_type == "Constant":
        return _constant(node.outputs[0])
    if node.op_type in _CHOOSING:
        data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        return _hull(_seen(value, raw, grids) for value in data)
    transfer = _TRANSFERS.get(node.op_type)
    return _UNBOUNDED if transfer is None else transfer(node, [_seen(value, raw, grids) for value in node.inputs])


def _seen(value: ir.Value | None, raw: Mapping[str, Interval], grids: Mapping[str, QParams]) -> Interval:
    """What a reader of a value sees: after rounding, where it is rounded."""
    if value is None:
        return _UNBOUNDED
    name = str(value.name)
    if name not in raw:
        return _constant(value)
    if name not in grids:
        return raw[name]
    low, high = grids[name].dequantize(np.array(codes(raw[name], grids[name])))
    return Interval(float(low), float(high))


def _constant(value: ir.Value) -> Interval:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or not tensor.size:
        return _UNBOUNDED
    data = tensor.numpy()
    return Interval(float(data.min()), float(data.max()))


def _hull(parts: Iterable[Interval]) -> Interval:
    parts = list(parts)
    return Interval(min(part.low for part in parts), max(part.high for part in parts))


def _silu_source(mul: ir.Node) -> ir.Value | None:
    """The x of `x * sigmoid(x)`; None for any other product."""
    for source, gate in (mul.inputs, mul.inputs[::-1]):
        maker = None if gate is None else gate.producer()
        if maker is not None and maker.op_type == "Sigmoid" and maker.inputs[0] is source:
            return source
    return None


def _silu(source: ir.Value, mul: ir.Node, raw: Mapping[str, Interval], grids: Mapping[str, QParams]) -> Interval:
    """SiLU of a rounded x by enumerating its codes, of any other x by the minimum of the function."""
    (gate,) = {value for value in mul.inputs if value is not source}
    assert gate is not None
    grid, gate_grid = grids.get(str(source.name)), grids.get(str(gate.name))
    if grid is not None:
        lowest, highest = codes(raw[str(source.name)], grid)
        products = _silu_values(grid.dequantize(np.arange(lowest, highest + 1)), gate_grid)
        return Interval(float(products.min()), float(products.max()))
    x = _seen(source, raw, grids)
    if gate_grid is None:
        return Interval(0.0 if x.low >= 0 else _SILU_LOW, max(x.high, 0.0))
    return _product(mul, [x, _seen(gate, raw, grids)])


def _silu_values(x: NDArray[np.float32], gate_grid: QParams | None) -> NDArray[np.float32]:
    """`x * sigmoid(x)` with the sigmoid rounded; at a tie both of its codes."""
    with np.errstate(over="ignore"):  # whose sigmoid is the 0 that it should be
        sigmoid = (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)
    if gate_grid is None:
        return x * sigmoid
    step = np.float32(MARGIN) * gate_grid.scale
    return np.stack([x * gate_grid.fake_quantize(sigmoid + shift) for shift in (-step, step)])


def _product(node: ir.Node, inputs: Sequence[Interval]) -> Interval:
    ends = [(interval.low, interval.high) for interval in inputs]
    if not all(math.isfinite(end) for pair in ends for end in pair):
        return _UNBOUNDED
    products = [left * right for left, right in product(*ends)]
    return Interval(min(products), max(products))


def _sum(node: ir.Node, inputs: Sequence[Interval]) -> Interval:
    return Interval(sum(interval.low for interval in inputs), sum(interval.high for interval in inputs))


def _clip(node: ir.Node, inputs: Sequence[Interval]) -> Interval:
    """`min(max(x, low), high)`, where either bound may be absent, or itself be known to an interval only."""
    low, high = Interval(-math.inf, -math.inf), Interval(math.inf, math.inf)
    if len(inputs) > 1 and node.inputs[1] is not None:
        low = inputs[1]
    if len(inputs) > 2 and node.inputs[2] is not None:
        high = inputs[2]
    x = inputs[0]
    return Interval(min(max(x.low, low.low), high.low), min(max(x.high, low.high), high.high))


def _hard_swish(node: ir.Node, inputs: Sequence[Interval]) -> Interval:
    return Interval(0.0 if inputs[0].low >= 0 else _HARD_SWISH_LOW, max(inputs[0].high, 0.0))


def _resize(node: ir.Node, inputs: Sequence[Interval]) -> Interval:
    """Only nearest neighbours are values of the input: cubic interpolation overshoots, cropping makes others up."""
    cropping = node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    nearest = node.attributes.get_string("mode", "nearest") == "nearest"
    return inputs[0] if nearest and not cropping else _UNBOUNDED


_TRANSFERS: Mapping[str, Callable[[ir.Node, Sequence[Interval]], Interval]] = {
    "Add": _sum,
    "Clip": _clip,
    "HardSigmoid": lambda node, inputs: _UNIT,
    "HardSwish": _hard_swish,
    "Mul": _product,
    "Relu": lambda node, inputs: Interval(max(inputs[0].low, 0.0), max(inputs[0].high, 0.0)),
    "Resize": _resize,
    "Sigmoid": lambda node, inputs: _UNIT,
}
