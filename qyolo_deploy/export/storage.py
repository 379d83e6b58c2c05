"""In what ONNX files keep integer weights: the narrowest type that holds a grid, and the opset that has it."""

from dataclasses import dataclass

import onnx_ir as ir

from qyolo_deploy.errors import InputError
from qyolo_deploy.quant.spec import QuantSpec

# Later opsets changed what these compute, not only the types they take.
_CHANGED_SINCE = frozenset(["GroupNormalization"])


@dataclass(frozen=True)
class Container:
    """A type of packed integers.

    Args:
        dtype: The type, of which one byte holds several.
        bits: Its width; the integers are signed.
        opset: The first that has it.
        ir_version: The one that came with that opset.
    """

    dtype: ir.DataType
    bits: int
    opset: int
    ir_version: int

    def holds(self, spec: QuantSpec) -> bool:
        """Whether all codes of a grid fit."""
        limit = 1 << (self.bits - 1)
        return -limit <= spec.qmin and spec.qmax < limit


INT4 = Container(ir.DataType.INT4, 4, opset=21, ir_version=10)
INT2 = Container(ir.DataType.INT2, 2, opset=25, ir_version=13)
# ONNX has no integers of 3 bits, and grids of 3 and 4 bits do not stop a file from packing those of 2.
_PACKED = {"int8": (), "int4": (INT4,), "int2": (INT2, INT4)}


def container_for(spec: QuantSpec, storage: str) -> Container | None:
    """The narrowest packed type that a file may have and that holds a grid; None for int8.

    Args:
        spec: Grid of the weights.
        storage: `int8`, `int4` or `int2`: the narrowest type of the file.
    """
    return next((container for container in _PACKED[storage] if container.holds(spec)), None)


def raise_opset(model: ir.Model, container: Container) -> None:
    """Declares the opset that has a packed type, if the model's is older.

    Requires that all operators mean the same in both, which is so for all that float detectors are exported with.

    Raises:
        InputError: If one does not.
    """
    if changed := sorted({node.op_type for node in model.graph} & _CHANGED_SINCE):
        raise InputError(f"'{changed[0]}' means something else in opset {container.opset}, which has packed weights")
    model.opset_imports[""] = max(model.opset_imports[""], container.opset)
    model.ir_version = max(model.ir_version or 0, container.ir_version)
