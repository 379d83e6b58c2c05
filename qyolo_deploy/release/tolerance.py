"""How far an engine may be off its golden vectors, by scheme, and why.

On the machine that made them an engine repeats itself bit by bit (ONNX Runtime and OpenVINO, any number of threads:
the order of a sum is the kernel's). Another processor means other kernels. In float they change the last digits: 3e-7
was seen. On an integer grid a value at a tie between two codes becomes the other code, all later layers see it, and
the fewer bits the activations have, the larger a code is. Seen on official and trained networks without the kernels'
fast instructions (AVX2 in place of VNNI): 2e-2 of the outputs' norm with activations of 8 bits, 5e-2 with 4 bits. A
wrong channel order or scale is 1e-1 to 1e0 away on the noise, which is why it is among the inputs.
"""

import re
from typing import Final

from qyolo_deploy.release.golden import Tolerance

EXACT: Final = Tolerance(relative_error=0.0, score=0.0, iou=1.0)
_FLOAT: Final = Tolerance(relative_error=1e-4, score=1e-3, iou=0.99)
_FINE: Final = Tolerance(relative_error=0.1, score=0.1, iou=0.5)
_COARSE: Final = Tolerance(relative_error=0.2, score=0.2, iou=0.5)
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
