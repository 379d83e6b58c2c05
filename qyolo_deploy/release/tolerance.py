"""How far an engine may be off its golden vectors, by scheme, and why.

On the machine that made them an engine repeats itself bit by bit: ONNX Runtime and OpenVINO, any number of threads,
since the order of a sum is the kernel's. Other kernels change last digits in float (3e-7 of the norm was seen). On an
integer grid a value at a tie between two codes becomes the other code, and all later layers see it; the fewer bits
the activations have, the larger a code is. Seen where the same QDQ graph ran in other kernels, as a share of the
scores' norm: at most 0.09 with activations of 8 bits. With 4 bits it was 0.7 to 1.0 on a network that finds little in
generated scenes: weak scores move by as much as they are, so that only gross errors show on another machine, and
`qyolo validate` is the better proof.

Kernels that compute something else are to be found, not allowed: yolov5n with weights of full 8-bit range saturates in
OpenVINO without VNNI instructions and is off by 0.8, scores by 0.4 (`quantization.weights.reduce_range`). A wrong
channel order is 0.5 to 0.9 away on its worst input, which is told at 8 bits and not at 4.
"""

import re
from typing import Final

from qyolo_deploy.release.golden import Tolerance

EXACT: Final = Tolerance(relative_error=0.0, score=0.0, iou=1.0)
_FLOAT: Final = Tolerance(relative_error=1e-4, score=1e-3, iou=0.99)
_FINE: Final = Tolerance(relative_error=0.2, score=0.1, iou=0.5)
_COARSE: Final = Tolerance(relative_error=1.2, score=0.2, iou=0.5)
_FINE_BITS = 8
_HERE = "the same runtime on the same processor repeats itself exactly; elsewhere "


def tolerances(scheme: str) -> tuple[Tolerance, Tolerance, str]:
    """Tolerance on the same machine, on another one, and the reason in a sentence.

    Args:
        scheme: `fp32`, or bits of weights and activations such as `w4a8`.
    """
    bits = re.match(r"w\d+a(\d+)", scheme)
    if bits is None:
        return EXACT, _FLOAT, _HERE + "sums in float differ in their last digits"
    if int(bits[1]) >= _FINE_BITS:
        return EXACT, _FINE, _HERE + "values at a tie between two codes of 8 bits may take the other one"
    return (
        EXACT,
        _COARSE,
        _HERE + f"values at a tie between two codes may take the other one, far off at {bits[1]} bits",
    )
