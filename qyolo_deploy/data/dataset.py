"""Loading a split of a detection dataset, checking its images, and its digest."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.data.coco_json import read_coco
from qyolo_deploy.data.dataset_yaml import SplitImages, read_dataset_yaml
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.records import Annotations, DetectionDataset, ImageRecord
from qyolo_deploy.data.search import find_input
from qyolo_deploy.data.yolo_labels import read_yolo_labels
from qyolo_deploy.errors import InputError

__all__ = [
    "DetectionDataset",
    "ImageRecord",
    "check_images",
    "digest_dataset",
    "digest_images",
    "find_input",
    "image_names",
    "load_dataset",
    "take_images",
]

_THREADS = min(os.cpu_count() or 1, 16)
_YAML_SUFFIXES = (".yaml", ".yml")


def load_dataset(source: Path, split: str = "val") -> DetectionDataset:
    """Load one split: image list, boxes, and COCO ground truth; no pixels.

    A dataset YAML whose root has `annotations/instances_<folder of the images>.json` takes boxes and ground
    truth from there, else from YOLO labels. Images without objects stay in.

    Args:
        source: A dataset YAML in the layout of ultralytics, a COCO JSON (which is one split, so that `split`
            only names it), or a folder with one such YAML or with `annotations/instances_<split>*.json`.
        split: Name of the split.

    Raises:
        InputError: Something is missing, unreadable or contradicts something else; it is named.
    """
    if not source.exists():
        raise InputError(f"{source}: the dataset does not exist")
    file = _find_in_folder(source, split) if source.is_dir() else source
    annotation_file: Path | None = file
    if file.suffix in _YAML_SUFFIXES:
        names, images = read_dataset_yaml(file, split)
        annotation_file = _official_annotations(images)
        if annotation_file is None:
            found = read_yolo_labels(images.paths, names)
        else:
            found = read_coco(annotation_file, names, images.paths, subset=images.listed)
    elif file.suffix == ".json":
        found = read_coco(file, None, None)
    else:
        raise InputError(f"{file}: expected a dataset YAML, a COCO JSON, or a folder that holds one")
    return _assemble(source, split, found, annotation_file)


def _assemble(source: Path, split: str, found: Annotations, annotation_file: Path | None) -> DetectionDataset:
    return DetectionDataset(
        source=source,
        split=split,
        class_names=found.class_names,
        category_ids=found.category_ids,
        images=found.images,
        boxes=found.boxes,
        classes=found.classes,
        ground_truth=found.ground_truth,
        annotation_file=annotation_file,
    )


def _find_in_folder(folder: Path, split: str) -> Path:
    files = sorted(path for path in folder.iterdir() if path.suffix in _YAML_SUFFIXES)
    what = "dataset YAML files"
    if not files:
        files = sorted((folder / "annotations").glob(f"instances_{split}*.json"))
        files = [path for path in files if path.stem == f"instances_{split}"] or files
        what = f"annotation files of the split '{split}'"
    if not files:
        raise InputError(f"{folder}: holds neither a dataset YAML nor annotations/instances_{split}*.json")
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise InputError(f"{folder}: holds several {what} ({names})", hint="Name the one to use.")
    return files[0]


def _official_annotations(images: SplitImages) -> Path | None:
    folders = {path.parent for path in images.paths}
    if len(folders) != 1:
        return None
    file = images.root / "annotations" / f"instances_{folders.pop().name}.json"
    return file if file.is_file() else None


def check_images(dataset: DetectionDataset, progress: Callable[[int, int], None] | None = None) -> None:
    """Decode every image, and compare its size with that in the annotations.

    Args:
        dataset: What to check.
        progress: Called with (images done, images in all).

    Raises:
        InputError: An image is missing, corrupt, cut off or of another size; it is named.
    """
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        try:
            for done, _ in enumerate(pool.map(_check_image, dataset.images), start=1):
                if progress is not None:
                    progress(done, len(dataset))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _check_image(record: ImageRecord) -> None:
    height, width = read_image(record.path).shape[:2]
    if (width, height) != (record.width, record.height):
        annotated = f"{record.width} x {record.height}"
        raise InputError(f"{record.path}: the image is {width} x {height} px, but annotated as {annotated}")


def take_images(dataset: DetectionDataset, indices: Sequence[int]) -> DetectionDataset:
    """A split with these of its images only, in this order."""
    images = tuple(dataset.images[index] for index in indices)
    ids = {image.image_id for image in images}
    truth = dict(dataset.ground_truth)
    for key, id_key in (("images", "id"), ("annotations", "image_id")):
        truth[key] = [entry for entry in truth[key] if entry[id_key] in ids]
    return replace(
        dataset,
        images=images,
        boxes=tuple(dataset.boxes[index] for index in indices),
        classes=tuple(dataset.classes[index] for index in indices),
        ground_truth=truth,
    )


def image_names(dataset: DetectionDataset) -> list[str]:
    """Paths of all images from their common folder, with `/`: what stays the same where a dataset moves."""
    base = Path(os.path.commonpath([image.path.absolute().parent for image in dataset.images]))
    return [image.path.absolute().relative_to(base).as_posix() for image in dataset.images]


def digest_images(
    images: Sequence[ImageRecord],
    sha256: Callable[[Path], str] = sha256_file,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Sha256 of the file of each image.

    Args:
        images: What to digest.
        sha256: Digest of a file; a cached one saves reading unchanged files again.
        progress: Called with (images done, images in all).

    Raises:
        InputError: A file cannot be read.
    """
    digests = []
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        for digest in pool.map(partial(_digest_file, sha256), (image.path for image in images)):
            digests.append(digest)
            if progress is not None:
                progress(len(digests), len(images))
    return digests


def _digest_file(sha256: Callable[[Path], str], path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read ({error.strerror})") from error


def digest_dataset(dataset: DetectionDataset, sha256: Callable[[Path], str] = sha256_file) -> str:
    """Sha256 over names (see `image_names`) and contents of all images, the classes and the annotations.

    Args:
        dataset: What to digest.
        sha256: Digest of a file; a cached one saves reading unchanged files again.

    Raises:
        InputError: A file cannot be read.
    """
    if dataset.annotation_file is None:
        annotations = hashlib.sha256(json.dumps(dataset.ground_truth, sort_keys=True).encode()).hexdigest()
    else:
        annotations = _digest_file(sha256, dataset.annotation_file)
    content = {
        "images": sorted(zip(image_names(dataset), digest_images(dataset.images, sha256), strict=True)),
        "classes": list(zip(dataset.class_names, dataset.category_ids, strict=True)),
        "annotations": annotations,
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
