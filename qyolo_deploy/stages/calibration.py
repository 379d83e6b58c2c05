"""`qyolo calibration`: choosing, verifying and showing calibration subsets. Only coverage needs torch."""

import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.console import Reporter
from qyolo_deploy.data.calibration import (
    NAME_PATTERN,
    CalibrationImage,
    CalibrationSet,
    Method,
    Preprocessing,
    Source,
    Weights,
    read_calibration_set,
)
from qyolo_deploy.data.calibration_check import (
    Selection,
    check_calibration_set,
    find_generator,
    refuse_validation_images,
    select_images,
)
from qyolo_deploy.data.calibration_choice import balance, count_objects, seeded_order, spread
from qyolo_deploy.data.dataset import check_images, digest_images, find_input, image_names, load_dataset, take_images
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.errors import InputError, RuntimeMissingError
from qyolo_deploy.stages.context import BUILTIN, builtin_weights
from qyolo_deploy.strict import validation_message

METHODS = get_args(Method)


@dataclass(frozen=True)
class CalibrationChoice:
    """How a subset is chosen, and what is told about it.

    Args:
        images: How many.
        method: `random`; `balanced`: classes as even as possible; `coverage`: activations as different as possible.
        seed: Of the random order, which for the other methods decides between equals.
        imgsz: Side in px of the square that the network sees.
        weights: For coverage the float model: a checkpoint, or `builtin:quickstart`.
        name: Of the subset; by default that of its file.
        dataset: Name of the data set; by default that of its folder or file.
        origin: Where the images can be had.
        license: Terms of the images.
    """

    images: int
    method: str = "random"
    seed: int = 0
    imgsz: int = 640
    weights: str | None = None
    name: str | None = None
    dataset: str | None = None
    origin: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method is {self.method}, expected one of {', '.join(METHODS)}")
        for key, least in (("images", 1), ("seed", 0)):
            if getattr(self, key) < least:
                raise InputError(f"{key} is {getattr(self, key)}, expected at least {least}")
        if self.imgsz < 32 or self.imgsz % 32:
            raise InputError(f"imgsz is {self.imgsz}, expected a positive multiple of 32")
        if (self.method == "coverage") != (self.weights is not None):
            raise InputError("weights: expected a checkpoint for the method coverage, and none for the others")


def create_calibration_set(
    data: str | Path, out: str | os.PathLike[str], choice: CalibrationChoice, reporter: Reporter | None = None
) -> CalibrationSet:
    """Chooses images of a training split and writes them down as a calibration subset.

    Args:
        data: Dataset with the splits train and val.
        out: JSON file to write; an existing one is refused.
        choice: How many images, and how to choose them.
        reporter: Where progress goes; by default nowhere.

    Raises:
        InputError: The data is not usable or has fewer images, a chosen one is a validation image, or `out` exists or
            cannot be written.
        RuntimeMissingError: Coverage without the packages that run the float model.
    """
    reporter, path = reporter or Reporter(quiet=True), Path(out)
    if path.exists():
        raise InputError(f"{path}: exists and is not overwritten", hint="Name another file, or remove this one.")
    name = choice.name or path.stem
    if not re.match(NAME_PATTERN, name):
        raise InputError(
            f"name is {name!r}, expected letters, digits, '.', '_' and '-', with one of the first two first"
        )
    source = find_input(data)
    training, validation = load_dataset(source, "train"), load_dataset(source, "val")
    if choice.images > len(training):
        raise InputError(f"{source}: {choice.images} images are wanted, but the training split has {len(training)}")
    weights = None if choice.weights is None else _find_weights(choice.weights)
    chosen = _choose(training, choice, weights, reporter)
    calibration = _describe(training, chosen, choice, weights, name)
    with reporter.progress("comparing with validation images") as tick:
        refuse_validation_images(calibration, validation, progress=tick)
    write_atomic(path, calibration.to_text())
    return calibration


def _find_weights(name: str) -> Path:
    path = builtin_weights(name) if name.startswith(BUILTIN) else find_input(name, what="weights")
    if not path.is_file():
        raise InputError(f"weights '{name}' are not a file")
    return path


def _choose(
    training: DetectionDataset, choice: CalibrationChoice, weights: Path | None, reporter: Reporter
) -> list[int]:
    order = seeded_order(image_names(training), choice.seed)
    if weights is not None:
        places = spread(_activations(take_images(training, order), weights, choice.imgsz, reporter), choice.images)
    elif choice.method == "balanced":
        objects = count_objects([training.classes[index] for index in order], len(training.class_names))
        places = balance(objects, choice.images)
    else:
        places = list(range(choice.images))
    return [order[place] for place in places]


def _activations(training: DetectionDataset, weights: Path, imgsz: int, reporter: Reporter) -> NDArray[np.float32]:
    try:
        coverage = importlib.import_module("qyolo_deploy.stages.coverage")
    except ModuleNotFoundError as error:
        raise RuntimeMissingError(
            f"calibration by coverage: the package '{error.name}' is not installed",
            hint='pip install "qyolo_deploy[build]"',
        ) from error
    with reporter.progress("activations") as tick:
        rows: NDArray[np.float32] = coverage.describe_images(training.images, weights, imgsz, tick)
    return rows


def _describe(
    training: DetectionDataset, chosen: list[int], choice: CalibrationChoice, weights: Path | None, name: str
) -> CalibrationSet:
    """The chosen images as a subset, once they are known to be whole."""
    subset, names = take_images(training, chosen), image_names(training)
    check_images(subset)
    numbered = training.annotation_file is not None  # else ids only count the images of this copy
    try:
        return CalibrationSet(
            name=name,
            method=choice.method,  # type: ignore[arg-type]  # Choice has checked it
            seed=choice.seed,
            weights=None if weights is None else Weights(file_name=weights.name, sha256=sha256_file(weights)),
            source=Source(
                dataset=choice.dataset or training.source.stem,
                origin=choice.origin,
                license=choice.license,
                generator=find_generator(training),
            ),
            preprocessing=Preprocessing(imgsz=choice.imgsz),
            images=tuple(
                CalibrationImage(
                    file_name=names[index],
                    id=image.image_id if numbered else None,
                    sha256=digest,
                    width=image.width,
                    height=image.height,
                )
                for index, image, digest in zip(chosen, subset.images, digest_images(subset.images), strict=True)
            ),
        )
    except ValidationError as error:
        raise InputError(f"the calibration subset cannot be written down, {validation_message(error)}") from error


def verify_calibration_set(
    path: str | os.PathLike[str], data: str | Path, reporter: Reporter | None = None
) -> tuple[CalibrationSet, Selection]:
    """Proves that all images of a subset are in the training split, unchanged, and none in the validation split.

    Args:
        path: File of the subset.
        data: Dataset with the splits train and val.
        reporter: Where progress goes; by default nowhere.

    Returns:
        The subset, and its images as found.

    Raises:
        InputError: The file or the data is not usable, an image is missing, or is a validation image.
        IntegrityError: An image is another one than recorded.
    """
    calibration, source = read_calibration_set(Path(path)), find_input(data)
    training, validation = load_dataset(source, "train"), load_dataset(source, "val")
    with (reporter or Reporter(quiet=True)).progress("comparing with validation images") as tick:
        return calibration, check_calibration_set(calibration, training, validation, tick)


def count_classes(calibration: CalibrationSet, data: str | Path) -> list[dict[str, Any]]:
    """Images that show a class, and objects of it, for each class of the data set.

    Raises:
        InputError: The data is not usable, or an image is missing.
        IntegrityError: An image is another one than recorded.
    """
    subset = select_images(calibration, load_dataset(find_input(data), "train")).dataset
    objects = count_objects(subset.classes, len(subset.class_names))
    images = (objects > 0).sum(axis=0).tolist()
    return [
        {"name": name, "images": shown, "objects": count}
        for name, shown, count in zip(subset.class_names, images, objects.sum(axis=0).tolist(), strict=True)
    ]
