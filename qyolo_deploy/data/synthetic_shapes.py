"""Signed distances and textures from which the synthetic scenes are drawn.

Arrays only go through operations that IEEE 754 rounds exactly (+, -, *, /, sqrt, floor, min, max), because
numpy's vectorised sine and arctangent differ in the last bit between processors.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Shape = Callable[[FloatArray, FloatArray, float], FloatArray]
Texture = Callable[[FloatArray, FloatArray, float], FloatArray]


def disc(u: FloatArray, v: FloatArray, radius: float) -> FloatArray:
    """Distance in px to the edge of a disc, negative inside, as for all shapes here."""
    return _length(u, v) - np.float32(radius)


def ring(u: FloatArray, v: FloatArray, radius: float) -> FloatArray:
    """Distance to a ring that is 0.4 radii wide."""
    width = 0.4 * radius
    return _f32(np.abs(_length(u, v) - np.float32(radius - width / 2)) - np.float32(width / 2))


def rounded_square(u: FloatArray, v: FloatArray, radius: float) -> FloatArray:
    """Distance to a square with rounded corners, of about the area of the disc of that radius."""
    half = 0.85 * radius
    return _rounded_box(u, v, half, half, 0.25 * radius)


def bar(u: FloatArray, v: FloatArray, radius: float) -> FloatArray:
    """Distance to a box four times as long as it is wide."""
    return _rounded_box(u, v, radius, 0.25 * radius, 0.05 * radius)


def cross(u: FloatArray, v: FloatArray, radius: float) -> FloatArray:
    """Distance to two bars at right angles."""
    arm = 0.3 * radius
    return np.minimum(_rounded_box(u, v, radius, arm, 0.0), _rounded_box(u, v, arm, radius, 0.0))


def half_disc(u: FloatArray, v: FloatArray, radius: float) -> FloatArray:
    """Distance to the upper half of a disc."""
    return np.maximum(disc(u, v, radius), -v)


def triangle(u: FloatArray, v: FloatArray, radius: float) -> FloatArray:
    """Distance to an equilateral triangle with corners at `radius`."""
    return _nth_half_plane(u, v, 3, radius * math.cos(math.pi / 3), 1)


def pentagon(u: FloatArray, v: FloatArray, radius: float) -> FloatArray:
    """Distance to a regular pentagon with corners at `radius`."""
    return _nth_half_plane(u, v, 5, radius * math.cos(math.pi / 5), 1)


def star(u: FloatArray, v: FloatArray, radius: float) -> FloatArray:
    """Distance to a five-pointed star with tips at `radius`.

    A pentagram is what lies inside at least four of its five lines, so the second largest distance decides.
    """
    return _nth_half_plane(u, v, 5, radius * math.cos(2 * math.pi / 5), 2)


def stripes(u: FloatArray, v: FloatArray, period: float) -> FloatArray:
    """Coverage 0..1 of parallel stripes, each half a period wide."""
    return _f32(np.clip(_wave(u, period) + np.float32(0.5), 0, 1))


def dots(u: FloatArray, v: FloatArray, period: float) -> FloatArray:
    """Coverage 0..1 of round dots on a square grid."""
    du = (u / np.float32(period) - np.floor(u / np.float32(period)) - np.float32(0.5)) * np.float32(period)
    dv = (v / np.float32(period) - np.floor(v / np.float32(period)) - np.float32(0.5)) * np.float32(period)
    return _f32(np.clip(np.float32(0.32 * period + 0.5) - _length(du, dv), 0, 1))


def checks(u: FloatArray, v: FloatArray, period: float) -> FloatArray:
    """Coverage 0..1 of a checkerboard."""
    a, b = _wave(u, period), _wave(v, period)
    edge = np.minimum(np.abs(a), np.abs(b))
    return _f32(np.clip(np.where(a * b > 0, edge, -edge) + np.float32(0.5), 0, 1))


def plain(u: FloatArray, v: FloatArray, period: float) -> FloatArray:
    """No texture at all."""
    return np.zeros_like(u)


def _f32(values: object) -> FloatArray:
    return np.asarray(values, np.float32)


def _length(u: FloatArray, v: FloatArray) -> FloatArray:
    return _f32(np.sqrt(u * u + v * v))


def _wave(u: FloatArray, period: float) -> FloatArray:
    """Distance in px to the nearest stripe edge, positive inside a stripe."""
    phase = u / np.float32(period)
    phase = phase - np.floor(phase)
    return _f32((np.float32(0.25) - np.abs(phase - np.float32(0.5))) * np.float32(period))


def _rounded_box(u: FloatArray, v: FloatArray, half_u: float, half_v: float, corner: float) -> FloatArray:
    du, dv = np.abs(u) - np.float32(half_u - corner), np.abs(v) - np.float32(half_v - corner)
    outside = _length(np.maximum(du, 0), np.maximum(dv, 0))
    return outside + np.minimum(np.maximum(du, dv), 0) - np.float32(corner)


def _nth_half_plane(u: FloatArray, v: FloatArray, sides: int, apothem: float, rank: int) -> FloatArray:
    """The largest (rank 1) or second largest (rank 2) distance to the sides of a regular polygon."""
    ranked: list[FloatArray] = []
    for side in range(sides):
        angle = 2 * math.pi * side / sides
        distance = np.float32(math.cos(angle)) * u + np.float32(math.sin(angle)) * v - np.float32(apothem)
        ranked = _insert_ranked(ranked, distance, rank)
    return ranked[rank - 1]


def _insert_ranked(ranked: Sequence[FloatArray], value: FloatArray, keep: int) -> list[FloatArray]:
    out: list[FloatArray] = []
    for larger in ranked:
        out.append(np.maximum(larger, value))
        value = np.minimum(larger, value)
    return [*out, value][:keep]
