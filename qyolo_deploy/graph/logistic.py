"""The sigmoid to the last bit as the kernels of ONNX Runtime compute it.

Where the sigmoid of a level lies within a few units in the last place of a tie between two output levels, which of
them it becomes depends on the approximation, and one level that turns reaches most codes behind it.
"""

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_LIMIT = np.float32(18)
# Odd numerator and even denominator, highest power first: the rational minimax approximation of the logistic function
# less one half that Eigen and MLAS share.
_NUMERATOR = np.array(
    [4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03, 2.48287947061529e-01],
    np.float32,
)
_DENOMINATOR = np.array(
    [
        6.10247389755681e-13,
        5.76102136993427e-09,
        6.29106785017040e-06,
        1.70198817374094e-03,
        1.16817656904453e-01,
        9.93151921023180e-01,
    ],
    np.float32,
)


def logistic(x: Float32) -> Float32:
    """Sigmoid of float32 values of any shape, computed with fused multiply-adds in float32."""
    value = np.asarray(np.clip(x, -_LIMIT, _LIMIT), np.float32)
    square = value * value
    ratio = _horner(_NUMERATOR, square) * value / _horner(_DENOMINATOR, square)
    result: Float32 = np.clip(ratio + np.float32(0.5), np.float32(0), np.float32(1))
    return result


def _horner(coefficients: Float32, x: Float32) -> Float32:
    """A polynomial with one rounding for each multiplication and addition together."""
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        # A product of two float32 is exact in float64.
        total = (total.astype(np.float64) * x + np.float64(coefficient)).astype(np.float32)
    return total
