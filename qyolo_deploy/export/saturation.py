"""Where a grid of fewer than 8 bits needs no clipping besides that of its 8-bit container.

QuantizeLinear clips to the whole container. With the codes at the container's top, it is the upper end of the grid
that saturates; the lower end holds by itself where no value can fall below it.
"""

from typing import Literal

import numpy as np
import onnx_ir as ir

from qyolo_deploy.errors import InputError
from qyolo_deploy.export.intervals import bounds, unclipped_low
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.quant.spec import QuantSpec

Method = Literal["saturating", "clip"]


def container_of(spec: QuantSpec) -> type[np.int8 | np.uint8]:
    """The 8-bit type that holds a grid."""
    return np.int8 if spec.signed else np.uint8


def shift_to_top(spec: QuantSpec) -> int:
    """How far the codes of a grid move up so that the highest is the container's highest; 0 for 8 bits."""
    return int(np.iinfo(container_of(spec)).max) - spec.qmax


def low_bit_activations(
    model: ir.Model, quantized: QuantizedModel, leave_out: frozenset[str] = frozenset()
) -> dict[str, Method]:
    """Tells how each activation that does not fill its container keeps to its grid.

    Args:
        model: Float, from `export_float`.
        quantized: Scales and zero points.
        leave_out: Tensors that the target does not quantize.

    Returns:
        Tensor name -> `saturating` where it is proven that no value rounds to less than qmin, for images in 0..1;
        `clip` where the graph needs a node for it.

    Raises:
        InputError: If the graph does not have a tensor of the quantized model.
    """
    grids = {name: grid for name, grid in quantized.activations.items() if name not in leave_out}
    intervals = bounds(model.graph, grids)
    methods: dict[str, Method] = {}
    for name, grid in grids.items():
        if name not in intervals:
            raise InputError(f"the exported graph has no tensor '{name}'")
        if grid.spec.qmin + shift_to_top(grid.spec) == np.iinfo(container_of(grid.spec)).min:
            continue
        is_safe = unclipped_low(intervals[name], grid) >= grid.spec.qmin
        methods[name] = "saturating" if is_safe else "clip"
    return methods
