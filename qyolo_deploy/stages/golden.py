"""Making golden vectors: inputs, and what every engine of a release makes of them; see `release.golden`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox
from qyolo_deploy.data.synthetic import GENERATOR_VERSION
from qyolo_deploy.data.synthetic_scene import draw_scene
from qyolo_deploy.device.machine import describe_machine
from qyolo_deploy.device.results import Result, run_engine
from qyolo_deploy.engines.base import Runner
from qyolo_deploy.release.golden import (
    GOLDEN_NAME,
    Golden,
    GoldenEngine,
    GoldenInput,
    GoldenOutput,
    GoldenResult,
)
from qyolo_deploy.release.manifest import Postprocessing
from qyolo_deploy.release.tolerance import tolerances

_SEED = 20_240_807  # of no data set: validation scenes are drawn from small seeds
_SCENES = 8
_IMAGES = 2
_COMPARED = 10
_MIN_SCORE = 0.1
_CELLS = 256
_BOXES = 4


@dataclass(frozen=True)
class Subject:
    """An engine, loaded, with its scheme (`w4a8`)."""

    runner: Runner
    scheme: str


@dataclass(frozen=True)
class Picture:
    """An input, uint8 `[H, W, 3]` RGB after the letterbox, and where it comes from."""

    origin: str
    image: NDArray[np.uint8]


def make_golden(
    engines: Mapping[str, Subject],
    pictures: Sequence[Picture],
    thresholds: Postprocessing,
    source: Literal["generated", "validation"],
) -> dict[str, bytes]:
    """Runs every engine on every picture.

    Args:
        engines: By view.
        pictures: The inputs.
        thresholds: Of the release.
        source: Where the pictures come from.

    Returns:
        Content by path in the release, `golden/golden.json` among them.
    """
    files: dict[str, bytes] = {}
    inputs = []
    for number, picture in enumerate(pictures):
        height, width, _ = picture.image.shape
        inputs.append(GoldenInput(path=f"golden/input_{number}.u8", height=height, width=width, origin=picture.origin))
        files[inputs[-1].path] = picture.image.tobytes()
    entries = [run_golden(files, view, subject, pictures, thresholds) for view, subject in engines.items()]
    golden = Golden(
        source=source, compared=_COMPARED, min_score=_MIN_SCORE, inputs=tuple(inputs), engines=tuple(entries)
    )
    return files | {GOLDEN_NAME: golden.to_text().encode()}


def run_golden(
    files: dict[str, bytes], view: str, subject: Subject, pictures: Sequence[Picture], thresholds: Postprocessing
) -> GoldenEngine:
    """Runs one engine on every picture, and adds what it made of them to the files."""
    results = []
    for number, picture in enumerate(pictures):
        result = run_engine(subject.runner, picture.image, thresholds)
        results.append(_record(files, f"golden/{view}/input_{number}", number, result))
    same, other, reason = tolerances(subject.scheme)
    return GoldenEngine(
        view=view,
        machine=describe_machine(subject.runner.runtime),
        same_machine=same,
        other_machine=other,
        reason=reason,
        results=tuple(results),
    )


def choose_pictures(
    source: Literal["generated", "validation"], dataset: Path, imgsz: int, runner: Runner, thresholds: Postprocessing
) -> list[Picture]:
    """The inputs: two images with something to detect, and noise that reaches both ends of every range.

    Args:
        source: `generated` draws scenes, of which those with the highest scores are taken.
        dataset: Whose validation split `validation` takes images from.
        imgsz: Side of the square input in px.
        runner: That looks for something to detect.
        thresholds: Of the release.
    """
    noise = np.random.default_rng([_SEED, _SCENES]).integers(0, 256, (imgsz, imgsz, 3), np.uint8)
    pictures = _scenes(imgsz) if source == "generated" else _validation_images(dataset, imgsz)
    scores = [run_engine(runner, picture.image, thresholds).detections[:_COMPARED, 4].sum() for picture in pictures]
    best = np.argsort(-np.array(scores), kind="stable")[:_IMAGES]
    return [*(pictures[index] for index in sorted(best)), Picture("noise", noise)]


def _scenes(imgsz: int) -> list[Picture]:
    return [
        Picture(
            f"scene {index} of generator {GENERATOR_VERSION}",
            draw_scene(np.random.default_rng([_SEED, index]), imgsz)[0],
        )
        for index in range(_SCENES)
    ]


def _validation_images(dataset: Path, imgsz: int) -> list[Picture]:
    records = load_dataset(dataset, "val").images
    chosen = sorted({int(index) for index in np.linspace(0, len(records) - 1, _SCENES)})
    return [
        Picture(f"validation image {index}", letterbox(read_image(records[index].path), imgsz, rect=False)[0])
        for index in chosen
    ]


def _record(files: dict[str, bytes], stem: str, number: int, result: Result) -> GoldenResult:
    """Adds a result's files, and tells what they are."""
    outputs = []
    for name, output in result.outputs.items():
        boxes = _BOXES if len(result.outputs) == 1 and output.ndim == 3 else 0
        indices = chosen_places(output, boxes)
        base = f"{stem}.{name}"
        entry = GoldenOutput(
            name=name,
            shape=output.shape,
            box_channels=boxes,
            count=len(indices),
            indices=f"{base}.indices.u32",
            values=f"{base}.values.f32",
        )
        files[entry.indices] = indices.astype("<u4").tobytes()
        files[entry.values] = output.reshape(-1)[indices].astype("<f4").tobytes()
        outputs.append(entry)
    path = f"{stem}.detections.f32"
    files[path] = result.detections.astype("<f4").tobytes()
    return GoldenResult(input=number, outputs=tuple(outputs), detections=path, detection_count=len(result.detections))


def chosen_places(output: NDArray[np.float32], boxes: int) -> NDArray[np.int64]:
    """Flat places of all channels of the highest cells, and of cells spread evenly.

    Args:
        output: float32 `[1, C, ...]`.
        boxes: Leading channels that hold boxes, whose values say nothing about a find.
    """
    flat = output[0].reshape(output.shape[1], -1)
    channels, cells = flat.shape
    best = np.argsort(-flat[boxes:].max(axis=0), kind="stable")[: _CELLS // 2]
    spread = np.linspace(0, cells - 1, min(_CELLS // 2, cells)).astype(np.int64)
    chosen = np.unique(np.concatenate((best, spread)))
    return np.asarray((np.arange(channels)[:, None] * cells + chosen).reshape(-1), np.int64)
