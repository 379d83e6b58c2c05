"""Scales, zero points and the numpy reference arithmetic that every other implementation is compared with."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.errors import InputError
from qyolo_deploy.quant.spec import QuantSpec


@dataclass(frozen=True, eq=False)
class QParams:
    """Scale and zero point of one tensor: `real = scale * (integer - zero_point)`.

    Args:
        spec: The integer grid.
        scale: float32 `[]` (per tensor) or `[C]` (per channel).
        zero_point: int32 of the same shape, inside `[qmin, qmax]`.

    Raises:
        InputError: For scales that are not finite and positive, zero points outside the grid or wrong shapes.
    """

    spec: QuantSpec
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]

    def __post_init__(self) -> None:
        expected_ndim = 0 if self.spec.axis is None else 1
        if self.scale.ndim != expected_ndim or self.zero_point.shape != self.scale.shape:
            raise InputError(
                f"scale {self.scale.shape} and zero_point {self.zero_point.shape} do not fit "
                f"granularity {self.spec.granularity}"
            )
        if self.scale.dtype != np.float32 or self.zero_point.dtype != np.int32:
            raise InputError(f"scale is {self.scale.dtype} and zero_point {self.zero_point.dtype}")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise InputError("a scale is not finite and positive")
        if (self.zero_point < self.spec.qmin).any() or (self.zero_point > self.spec.qmax).any():
            raise InputError(f"a zero point lies outside [{self.spec.qmin}, {self.spec.qmax}]")

    @classmethod
    def of(cls, spec: QuantSpec, scale: object, zero_point: object = 0) -> "QParams":
        """Makes parameters from anything that numpy can convert; a single zero point serves all channels."""
        scales = np.asarray(scale, np.float32)
        points = np.broadcast_to(np.asarray(zero_point, np.int32), scales.shape).copy()
        return cls(spec, scales, points)

    def _along_axis(self, values: NDArray[Any], ndim: int) -> NDArray[Any]:
        if self.spec.axis is None:
            return values
        shape = [1] * ndim
        shape[self.spec.axis] = -1
        return values.reshape(shape)

    def quantize(self, real: NDArray[np.float32]) -> NDArray[np.int32]:
        """`clip(round(x / s) + z, qmin, qmax)`, rounding half to even in float32 as ONNX QuantizeLinear does."""
        scale = self._along_axis(self.scale, real.ndim)
        zero_point = self._along_axis(self.zero_point, real.ndim).astype(np.float64)
        rounded = np.rint(np.asarray(real, np.float32) / scale).astype(np.float64) + zero_point
        return np.asarray(np.clip(rounded, self.spec.qmin, self.spec.qmax), np.int32)

    def dequantize(self, integers: NDArray[np.integer]) -> NDArray[np.float32]:
        """`(q - z) * s` in float32, as ONNX DequantizeLinear computes it."""
        scale = self._along_axis(self.scale, integers.ndim)
        shifted = integers.astype(np.int32) - self._along_axis(self.zero_point, integers.ndim)
        return np.asarray(shifted.astype(np.float32) * scale, np.float32)

    def fake_quantize(self, real: NDArray[np.float32]) -> NDArray[np.float32]:
        """Float to the nearest representable float."""
        return self.dequantize(self.quantize(real))
