"""Calibration subsets as data: which images set the scales of a quantized model, and how they were chosen."""

import json
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from qyolo_deploy.artifact import canonical_json, sha256_json
from qyolo_deploy.errors import InputError
from qyolo_deploy.strict import RelativePath, Sha256, Strict, validation_message

SCHEMA_VERSION: Final = 1
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Method = Literal["random", "balanced", "coverage"]


class Preprocessing(Strict):
    """How an image becomes the network's input where the subset is used.

    `imgsz` is the side in px for which the subset was chosen. A build scales the images to its own.
    """

    letterbox: Literal["square"] = "square"
    imgsz: int = Field(ge=32, multiple_of=32)
    pad_value: Literal[114] = 114
    color: Literal["RGB"] = "RGB"
    scale: Literal["0..1"] = "0..1"


class Weights(Strict):
    """The float model whose activations were covered."""

    file_name: str
    sha256: Sha256


class Generator(Strict):
    """What the scenes of generated data depend on, apart from split and index."""

    version: int
    seed: int = Field(ge=0)
    imgsz: int = Field(gt=0)


class Source(Strict):
    """The data set that the images are from: always from its training split.

    `origin` tells where to get it, `license` under which terms. `generator` is there if it is generated.
    """

    dataset: str
    split: Literal["train"] = "train"
    origin: str | None = None
    license: str | None = None
    generator: Generator | None = None


class CalibrationImage(Strict):
    """One image: its path from the common folder of the split, its id in the annotations, and its content."""

    file_name: RelativePath
    id: int | None = None
    sha256: Sha256
    width: int = Field(gt=0)
    height: int = Field(gt=0)


class CalibrationSet(Strict):
    """A subset of a training split, in the order of choice: its first images are a good smaller subset."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(pattern=NAME_PATTERN)
    method: Method
    seed: int = Field(ge=0)
    weights: Weights | None = None
    source: Source
    preprocessing: Preprocessing
    images: tuple[CalibrationImage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if (self.method == "coverage") != (self.weights is not None):
            raise ValueError("'weights' belongs to the method coverage, and to no other")
        seen: set[str] = set()
        for image in self.images:
            if image.file_name in seen:
                raise ValueError(f"the image {image.file_name} is listed twice")
            seen.add(image.file_name)
        return self

    @property
    def digest(self) -> str:
        """Digest of the content, however the file is formatted."""
        return sha256_json(self.model_dump(mode="json"))

    def summary(self) -> dict[str, Any]:
        """All but the images themselves, of which it tells the number; with the digest."""
        told = self.model_dump(mode="json", exclude={"images"})
        return {**told, "images": len(self.images), "digest": self.digest}

    def to_text(self) -> str:
        """The content of its file: canonical JSON."""
        return canonical_json(self.model_dump(mode="json")) + "\n"


def read_calibration_set(path: Path) -> CalibrationSet:
    """Read a subset's file.

    Raises:
        InputError: It is missing, not JSON, of a newer version, or a key is missing, surplus or wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such calibration subset") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the calibration subset is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a calibration subset must be one JSON object")
    _check_version(path, content)
    try:
        return CalibrationSet.model_validate_json(canonical_json(content))
    except ValueError as error:  # pydantic's, or that of a number which JSON does not have
        reason = validation_message(error) if isinstance(error, ValidationError) else str(error)
        raise InputError(f"{path}: not a valid calibration subset, {reason}") from error


def _check_version(path: Path, content: dict[str, Any]) -> None:
    version = content.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version is {version}, but this program knows versions up to {SCHEMA_VERSION}",
            hint="A newer qyolo_deploy reads it.",
        )
