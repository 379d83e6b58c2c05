"""Finding a calibration subset's images in a data set, and proof that they are the recorded ones."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from qyolo_deploy.console import Tick
from qyolo_deploy.data.calibration import CalibrationImage, CalibrationSet, Generator
from qyolo_deploy.data.dataset import digest_images, take_images
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.data.synthetic import PARAMETERS_FILE
from qyolo_deploy.errors import InputError, IntegrityError


@dataclass(frozen=True)
class Selection:
    """A subset's images as found.

    Args:
        dataset: These images of the training split, in the subset's order, with their labels.
        digests: Sha256 of each as it is on disk.
        redrawn: How many are generated scenes with other bytes than recorded, see `select_images`.
    """

    dataset: DetectionDataset
    digests: tuple[str, ...]
    redrawn: int


def check_calibration_set(
    calibration: CalibrationSet,
    training: DetectionDataset,
    validation: DetectionDataset,
    progress: Tick | None = None,
) -> Selection:
    """Find a subset's images in the training split, and make sure that none is in the validation split.

    Args:
        calibration: The subset.
        training: Where its images must be.
        validation: Where they must not be.
        progress: Called with validation images compared, and how many there are.

    Raises:
        InputError: An image is missing, or is a validation image too.
        IntegrityError: An image is another one than recorded.
    """
    selection = select_images(calibration, training)
    refuse_validation_images(calibration, validation, selection.digests, progress)
    return selection


def select_images(calibration: CalibrationSet, training: DetectionDataset) -> Selection:
    """The subset's images, found by name and checked by content.

    An image is the one whose path ends with the recorded name. Its bytes must be the recorded ones, but for scenes that
    the same generator has drawn from the same seed. They hold the same objects, but OpenCV rounds differently from
    processor to processor, and its versions before 4.13 draw other blobs into the background.

    Raises:
        InputError: An image is missing or unreadable.
        IntegrityError: An image is another one than recorded.
    """
    candidates = _candidates(calibration, training)
    may_differ = calibration.source.generator is not None and calibration.source.generator == find_generator(training)
    places = sorted({place for found in candidates for place in found})
    digests = dict(zip(places, digest_images([training.images[place] for place in places]), strict=True))
    chosen, redrawn = [], 0
    for image, found in zip(calibration.images, candidates, strict=True):
        same = next((place for place in found if digests[place] == image.sha256), None)
        if same is None and may_differ:
            same, redrawn = found[0], redrawn + 1
        if same is None:
            raise IntegrityError(
                f"{training.images[found[0]].path}: not the image that the calibration subset '{calibration.name}' "
                "recorded, its SHA-256 is another one"
            )
        chosen.append(same)
    return Selection(take_images(training, chosen), tuple(digests[place] for place in chosen), redrawn)


def _candidates(calibration: CalibrationSet, training: DetectionDataset) -> list[list[int]]:
    """For each image of the subset the indices of those whose path ends with its name, least nested first."""
    by_name: dict[str, list[int]] = {}
    for index in sorted(range(len(training)), key=lambda index: len(training.images[index].path.parts)):
        by_name.setdefault(training.images[index].path.name, []).append(index)

    def find(image: CalibrationImage) -> list[int]:
        parts = PurePosixPath(image.file_name).parts
        return [
            index
            for index in by_name.get(parts[-1], ())
            if training.images[index].path.absolute().parts[-len(parts) :] == parts
        ]

    candidates = [find(image) for image in calibration.images]
    missing = [image.file_name for image, found in zip(calibration.images, candidates, strict=True) if not found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            f"calibration subset '{calibration.name}': the image {missing[0]}{more} is not in the training split of "
            f"{training.source}",
            hint=f"The subset is from {calibration.source.dataset}, {calibration.source.origin or 'origin unknown'}.",
        )
    return candidates


def find_generator(dataset: DetectionDataset) -> Generator | None:
    """What generated a data set, if it was generated."""
    root = dataset.source if dataset.source.is_dir() else dataset.source.parent
    try:
        recorded = json.loads((root / PARAMETERS_FILE).read_text(encoding="utf-8"))
        return Generator(version=recorded["version"], seed=recorded["seed"], imgsz=recorded["imgsz"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def refuse_validation_images(
    calibration: CalibrationSet,
    validation: DetectionDataset,
    found: Iterable[str] = (),
    progress: Tick | None = None,
) -> None:
    """Compare a subset with the validation split by content, under whatever names.

    Args:
        calibration: The subset, whose recorded digests count.
        validation: The validation split.
        found: Digests of its images on disk in the same order, which count too.
        progress: Called with validation images compared, and how many there are.

    Raises:
        InputError: An image of the subset is a validation image; both are named.
    """
    names = {image.sha256: image.file_name for image in calibration.images}
    names |= {digest: image.file_name for digest, image in zip(found, calibration.images, strict=False)}
    for digest, image in zip(digest_images(validation.images, progress=progress), validation.images, strict=True):
        if digest in names:
            raise InputError(
                f"calibration subset '{calibration.name}': the image {names[digest]} is the validation image "
                f"{image.path}",
                hint="What is calibrated on validation images is not measured by them: choose from the training split.",
            )
