"""Draws one synthetic scene: textured shapes of six classes on clutter, with exact boxes.

The classes are chosen so that neither the outline nor the texture alone is enough: discs and squares are told
apart by outline, their striped and dotted kinds by texture, and plain or checked ones are of no class. Stars
and rings carry any texture. Small objects stay hard, because their textures shrink with them.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.data import synthetic_shapes as shapes
from qyolo_deploy.data.synthetic_shapes import FloatArray

CLASSES: tuple[tuple[str, shapes.Shape, tuple[shapes.Texture, ...]], ...] = (
    ("striped disc", shapes.disc, (shapes.stripes,)),
    ("dotted disc", shapes.disc, (shapes.dots,)),
    ("striped square", shapes.rounded_square, (shapes.stripes,)),
    ("dotted square", shapes.rounded_square, (shapes.dots,)),
    ("star", shapes.star, (shapes.stripes, shapes.dots, shapes.checks, shapes.plain)),
    ("ring", shapes.ring, (shapes.stripes, shapes.dots, shapes.checks, shapes.plain)),
)
CLASS_NAMES = tuple(name for name, _, _ in CLASSES)
SMALLEST_PX = 8.0
MIN_VISIBLE = 0.3

_ANY_TEXTURE = (shapes.stripes, shapes.dots, shapes.checks, shapes.plain)
_DISTRACTORS: tuple[tuple[shapes.Shape, tuple[shapes.Texture, ...]], ...] = (
    (shapes.disc, (shapes.plain, shapes.checks)),
    (shapes.rounded_square, (shapes.plain, shapes.checks)),
    (shapes.triangle, _ANY_TEXTURE),
    (shapes.pentagon, _ANY_TEXTURE),
    (shapes.half_disc, _ANY_TEXTURE),
    (shapes.cross, _ANY_TEXTURE),
    (shapes.bar, _ANY_TEXTURE),
)
_DISTRACTOR = -1
# The corners of a square lie further out than its nominal radius: (0.85 - 0.25) * sqrt(2) + 0.25 = 1.099.
_REACH = 1.1


@dataclass(frozen=True)
class SceneObject:
    """One labelled object: box `x0, y0, x1, y1` in px around its visible pixels, and their number."""

    class_index: int
    box: tuple[int, int, int, int]
    area_px: int


@dataclass(frozen=True)
class _Item:
    class_index: int
    shape: shapes.Shape
    texture: shapes.Texture
    size_px: float
    x: float
    y: float


def draw_scene(rng: np.random.Generator, imgsz: int) -> tuple[NDArray[np.uint8], list[SceneObject]]:
    """Draw one scene.

    A box is tight around the pixels of the object that can be seen, as in COCO; an object of which more than
    70 % is hidden behind others or beyond the border keeps its pixels but loses its label.

    Args:
        rng: Source of all randomness of this scene.
        imgsz: Side of the square image in px.

    Returns:
        Image uint8 `[imgsz, imgsz, 3]` RGB, and its labelled objects (possibly none).
    """
    canvas = _background(rng, imgsz)
    owner = np.full((imgsz, imgsz), -1, np.int16)
    items = _arrange(rng, imgsz)
    full_area_px = [_paint(rng, canvas, owner, item, index) for index, item in enumerate(items)]
    return _camera(rng, canvas), _label(items, owner, full_area_px)


def _label(items: list[_Item], owner: NDArray[np.int16], full_area_px: list[float]) -> list[SceneObject]:
    objects = []
    for index, item in enumerate(items):
        if item.class_index == _DISTRACTOR:
            continue
        mask = owner == index
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        area = int(mask.sum())
        if area < MIN_VISIBLE * full_area_px[index] or len(columns) < 4 or len(rows) < 4:
            continue
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        objects.append(SceneObject(item.class_index, box, area))
    return objects


def _background(rng: np.random.Generator, imgsz: int) -> FloatArray:
    """Gradient, noise of several octaves, blobs and lines: float32 `[imgsz, imgsz, 3]` in 0..255."""
    corners = rng.uniform(20, 235, (2, 2, 3)).astype(np.float32)
    corners += (corners.mean(axis=(0, 1)) - corners) * np.float32(rng.uniform(0, 0.9))
    canvas = _stretch(corners, imgsz)
    amplitude, decay = rng.uniform(8, 45), rng.uniform(0.4, 0.85)
    cells = 4
    while cells <= imgsz // 4:
        noise = rng.standard_normal((cells, cells, 3), dtype=np.float32) * np.float32(amplitude)
        canvas += _stretch(noise, imgsz)
        cells, amplitude = cells * 2, amplitude * decay
    for _ in range(int(rng.integers(0, 7))):
        centre = tuple(int(c) for c in rng.integers(0, imgsz, 2))
        axes = tuple(int(a) for a in rng.integers(2, max(imgsz // 6, 3), 2))
        cv2.ellipse(canvas, centre, axes, float(rng.integers(0, 180)), 0, 360, _colour(rng).tolist(), -1, 16)
    for _ in range(int(rng.integers(0, 10))):
        start, end = (tuple(int(c) for c in rng.integers(-imgsz // 4, imgsz * 5 // 4, 2)) for _ in range(2))
        cv2.line(canvas, start, end, _colour(rng).tolist(), int(rng.integers(1, 4)), cv2.LINE_AA)
    return canvas


def _stretch(coarse: FloatArray, imgsz: int) -> FloatArray:
    return np.asarray(cv2.resize(coarse, (imgsz, imgsz), interpolation=cv2.INTER_LINEAR), np.float32)


def _colour(rng: np.random.Generator) -> FloatArray:
    return rng.uniform(10, 245, 3).astype(np.float32)


def _arrange(rng: np.random.Generator, imgsz: int) -> list[_Item]:
    """Choose what stands where, from back to front: mostly the large behind the small."""
    wanted = [True] * int(rng.integers(1, 13)) + [False] * int(rng.integers(0, 6))
    sizes = np.exp(rng.uniform(math.log(SMALLEST_PX), math.log(max(imgsz / 2, SMALLEST_PX)), len(wanted)))
    depth = np.log(sizes) + rng.normal(0, 0.4, len(wanted))
    items: list[_Item] = []
    for index in np.argsort(-depth, kind="stable"):
        size = float(sizes[index])
        spot = _find_spot(rng, imgsz, size, items)
        if spot is not None:
            items.append(_choose(rng, wanted[index], size, *spot))
    return items


def _find_spot(rng: np.random.Generator, imgsz: int, size: float, items: list[_Item]) -> tuple[float, float] | None:
    """A centre that overlaps others little, or now and then any centre, or None where all is full."""
    crowded = rng.random() < 0.2
    for _ in range(8):
        x, y = (float(c) for c in rng.uniform(0.35 * size, imgsz - 0.35 * size, 2))
        if crowded or all(math.hypot(x - i.x, y - i.y) > 0.42 * (size + i.size_px) for i in items):
            return x, y
    return None


def _choose(rng: np.random.Generator, wanted: bool, size: float, x: float, y: float) -> _Item:
    if wanted:
        class_index = int(rng.integers(0, len(CLASSES)))
        _, shape, textures = CLASSES[class_index]
    else:
        class_index = _DISTRACTOR
        shape, textures = _DISTRACTORS[int(rng.integers(0, len(_DISTRACTORS)))]
    return _Item(class_index, shape, textures[int(rng.integers(0, len(textures)))], size, x, y)


def _paint(rng: np.random.Generator, canvas: FloatArray, owner: NDArray[np.int16], item: _Item, index: int) -> float:
    """Blend one item into `canvas`, mark its pixels in `owner`, return its area in px before any hiding."""
    imgsz = owner.shape[0]
    reach = math.ceil(item.size_px / 2 * _REACH) + 1
    x0, y0 = math.floor(item.x) - reach, math.floor(item.y) - reach
    grid = np.arange(2 * reach + 1, dtype=np.float32)
    dx, dy = (grid + np.float32(x0 + 0.5 - item.x))[None, :], (grid + np.float32(y0 + 0.5 - item.y))[:, None]
    angle = float(rng.uniform(0, 2 * math.pi))
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    distance = item.shape(u, v, item.size_px / 2)
    coverage = np.clip(np.float32(0.5) - distance, 0, 1)
    colour = _surface(rng, item, u, v, distance, canvas)
    inside = coverage >= 0.5
    left, top = max(x0, 0), max(y0, 0)
    right, bottom = min(x0 + len(grid), imgsz), min(y0 + len(grid), imgsz)
    part = np.s_[top - y0 : bottom - y0, left - x0 : right - x0]
    whole = np.s_[top:bottom, left:right]
    canvas[whole] += (colour[part] - canvas[whole]) * coverage[part][:, :, None]
    owner[whole][inside[part]] = index
    return float(inside.sum())


def _surface(
    rng: np.random.Generator,
    item: _Item,
    u: FloatArray,
    v: FloatArray,
    distance: FloatArray,
    canvas: FloatArray,
) -> FloatArray:
    """Colours of an item, float32 `[h, w, 3]`: two tones in its texture, shading, sometimes an outline."""
    base = _colour(rng)
    if rng.random() < 0.25:
        base = canvas[int(item.y), int(item.x)] + rng.normal(0, 22, 3).astype(np.float32)
    step = rng.normal(0, 1, 3).astype(np.float32)
    step *= np.float32(rng.uniform(45, 160)) / np.maximum(np.abs(step).max(), np.float32(0.1))
    step = np.where(base + step > 255, -np.abs(step), np.where(base + step < 0, np.abs(step), step))
    period = item.size_px / float(rng.uniform(2.5, 5))
    shift_u, shift_v = (np.float32(s) for s in rng.uniform(0, period, 2))
    # Below four pixels a period the sampled texture would alias, so that it fades out instead.
    fade = np.float32(min(max((period - 1) / 3, 0), 1))
    tone = item.texture(u + shift_u, v + shift_v, period) * fade
    shade = 1 + np.float32(rng.uniform(-0.35, 0.35) / item.size_px) * (u + v)
    if rng.random() < 0.3:
        width = np.float32(rng.uniform(0.02, 0.06) * item.size_px)
        shade = shade * (1 - np.float32(rng.uniform(0.4, 0.9)) * np.clip(distance + width + 0.5, 0, 1))
    return np.asarray((base + step * tone[:, :, None]) * shade[:, :, None], np.float32)


def _camera(rng: np.random.Generator, canvas: FloatArray) -> NDArray[np.uint8]:
    """Uneven light, blur and sensor noise, then 8 bit; works in place."""
    imgsz = canvas.shape[0]
    light = np.repeat(rng.uniform(0.55, 1.25, (2, 2, 1)).astype(np.float32), 3, axis=2)
    canvas *= _stretch(light, imgsz)
    if rng.random() < 0.4:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), float(rng.uniform(0.4, 1.4))), np.float32)
    noise = rng.standard_normal((imgsz, imgsz), dtype=np.float32) * np.float32(rng.uniform(0, 14))
    canvas += cv2.merge([noise * gain for gain in rng.uniform(0.6, 1.4, 3).astype(np.float32)])
    np.rint(canvas, out=canvas)
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
