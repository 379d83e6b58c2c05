"""Golden vectors: inputs and what each validated engine made of them, so that a device can prove it computes the same.

Everything lies under `golden/` of a release, made to be read by firmware without a library: `golden.json` tells what
there is, all numbers are in raw little-endian files without a header.

    golden/golden.json                         index, see `Golden`; paths in it count from the release's root
    golden/input_0.u8                          uint8  [height, width, 3], RGB: an image after the letterbox
    golden/<view>/input_0.<output>.indices.u32 uint32 [count]: places in the flat output, C order, batch of one
    golden/<view>/input_0.<output>.values.f32  float32 [count]: what the engine gave at these places
    golden/<view>/input_0.detections.f32       float32 [detections, 6]: x1 y1 x2 y2 (pixels of the input), score, class;
                                               best first, after the manifest's post-processing

The network's input is `pixel / 255` (a division in float32), planes R, G, B: `[1, 3, height, width]`. An output is
`output0`, or each raw map of an engine that leaves decoding to its runner. An output of a network at 640 px has
millions of numbers, so that the places are chosen: all channels of the cells with the highest values, and of cells
spread evenly.

A device compares, for every output, `||found - values|| / ||values||` (Euclidean norms) with `relative_error`; the
first `box_channels` channels of an output (4 of `output0`, none of raw maps) make a group of their own, because boxes
in pixels are thousands of times larger than scores. The channel of a place is its index divided by the output's
cells, which is the product of the shape behind the second axis. For those of the first `compared` detections that
have a score of at least `min_score` it looks for one among all the device's of the same class with an IoU of at least
`iou` and a score that differs by at most `score`; and the same the other way round. `same_machine` holds where
runtime, version and processor are those of `machine`, `other_machine` everywhere else; `reason` says why they are as
they are.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from qyolo_deploy.artifact import canonical_json
from qyolo_deploy.errors import IntegrityError
from qyolo_deploy.strict import RelativePath, Strict, validation_message

GOLDEN_NAME = "golden/golden.json"
DETECTION_FIELDS = 6


class Machine(Strict):
    """What an engine ran on; the numbers of another one may differ in their last digits, or by rounded codes."""

    runtime: str
    version: str
    machine: str
    cpu: str
    abilities: tuple[str, ...]


class Tolerance(Strict):
    """How far a device may be off; see the module."""

    relative_error: float = Field(ge=0)
    score: float = Field(ge=0)
    iou: float = Field(ge=0, le=1)


class GoldenInput(Strict):
    """One image after the letterbox, as uint8 `[height, width, 3]`."""

    path: RelativePath
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    origin: str


class GoldenOutput(Strict):
    """Some numbers of one output of an engine."""

    name: str
    shape: tuple[int, ...] = Field(min_length=3)
    box_channels: int = Field(ge=0)
    count: int = Field(gt=0)
    indices: RelativePath
    values: RelativePath


class GoldenResult(Strict):
    """What an engine made of one input."""

    input: int = Field(ge=0)
    outputs: tuple[GoldenOutput, ...] = Field(min_length=1)
    detections: RelativePath
    detection_count: int = Field(ge=0)


class GoldenEngine(Strict):
    """The results of one engine of the release."""

    view: str
    machine: Machine
    same_machine: Tolerance
    other_machine: Tolerance
    reason: str
    results: tuple[GoldenResult, ...] = Field(min_length=1)


class Golden(Strict):
    """The content of `golden.json`."""

    schema_version: Literal[1] = 1
    source: Literal["generated", "validation"]
    compared: int = Field(gt=0)
    min_score: float = Field(ge=0, le=1)
    inputs: tuple[GoldenInput, ...] = Field(min_length=1)
    engines: tuple[GoldenEngine, ...] = Field(min_length=1)

    def to_text(self) -> str:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


def read_golden(release: Path) -> Golden:
    """Read the index of a verified release.

    Raises:
        IntegrityError: The release has none, or it is not valid.
    """
    file = release / GOLDEN_NAME
    try:
        body: Any = json.loads(file.read_text(encoding="utf-8"))
        return Golden.model_validate_json(canonical_json(body))
    except FileNotFoundError as error:
        raise IntegrityError(f"{release} has no {GOLDEN_NAME}, so there is nothing to compare with.") from error
    except ValidationError as error:
        raise IntegrityError(f"{file} is not valid: {validation_message(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{file} is not JSON.") from error


def read_image(release: Path, entry: GoldenInput) -> NDArray[np.uint8]:
    """The image of an input, uint8 `[H, W, 3]`.

    Raises:
        IntegrityError: The file has another length.
    """
    flat = np.frombuffer(_read(release / entry.path, entry.height * entry.width * 3), np.uint8)
    return flat.reshape(entry.height, entry.width, 3)


def read_output(release: Path, entry: GoldenOutput) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Places in the flat output and the values there.

    Raises:
        IntegrityError: A file has another length, or a place is outside the output.
    """
    indices = np.frombuffer(_read(release / entry.indices, 4 * entry.count), "<u4").astype(np.int64)
    if indices.max() >= int(np.prod(entry.shape, dtype=np.int64)):
        raise IntegrityError(f"{release / entry.indices} names a place outside the output {list(entry.shape)}.")
    values = np.frombuffer(_read(release / entry.values, 4 * entry.count), "<f4").astype(np.float32)
    return indices, values


def read_detections(release: Path, entry: GoldenResult) -> NDArray[np.float32]:
    """Detections, float32 `[n, 6]`.

    Raises:
        IntegrityError: The file has another length.
    """
    raw = _read(release / entry.detections, 4 * DETECTION_FIELDS * entry.detection_count)
    return np.frombuffer(raw, "<f4").astype(np.float32).reshape(-1, DETECTION_FIELDS)


def _read(file: Path, size_bytes: int) -> bytes:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{file} cannot be read: {error.strerror}.") from error
    if len(raw) != size_bytes:
        raise IntegrityError(f"{file} has {len(raw)} bytes, but {size_bytes} are expected.")
    return raw
