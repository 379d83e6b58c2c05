"""COCO annotation files: read, checked entry by entry, and matched to images on disk."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.data.records import Annotations, ImageRecord
from qyolo_deploy.errors import InputError


def read_coco(
    file: Path, class_names: tuple[str, ...] | None, paths: Sequence[Path] | None, subset: bool = False
) -> Annotations:
    """Read the annotations of a split.

    The ground truth keeps every annotation as it is given; only missing `iscrowd` and `area`, and ids that an
    evaluation would misread, are filled in.

    Args:
        file: COCO JSON.
        class_names: Order of the classes, matched to the categories by name; None for ascending category id.
        paths: The images, whose order counts, matched by file name; None to look for the listed ones on disk.
        subset: Whether the file may list images that are not among `paths`; they are left out.

    Raises:
        InputError: The file is unreadable or contradicts itself, the classes, or the images.
    """
    content = load_coco(file)
    names, category_ids = _match_classes(file, content["categories"], class_names)
    found = _find_images(file, content["images"]) if paths is None else _match_images(file, content, paths)
    images = tuple(ImageRecord(entry["id"], path, entry["width"], entry["height"]) for entry, path in found)
    if len(images) < len(content["images"]):
        known = {image.image_id for image in images}
        if not subset:
            missing = next(entry for entry in content["images"] if entry["id"] not in known)
            raise InputError(f"{file}: the listed image {missing['file_name']} is not among the split's images")
        for key, id_key in (("images", "id"), ("annotations", "image_id")):
            content[key] = [entry for entry in content[key] if entry[id_key] in known]
    boxes, classes = _training_boxes(content["annotations"], images, category_ids)
    return Annotations(names, category_ids, images, boxes, classes, content)


def _find_images(file: Path, entries: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Path]]:
    """Find the folder that holds the first image, where all others must be too."""
    split = file.stem.removeprefix("instances_")
    above = file.parent.parent
    folders = (file.parent, above / "images" / split, above / "images", above / split)
    folder = next((f for f in folders if (f / entries[0]["file_name"]).is_file()), None)
    if folder is None:
        searched = ", ".join(str(f) for f in folders)
        raise InputError(f"{file}: the listed image {entries[0]['file_name']} is in none of {searched}")
    found = [(entry, folder / entry["file_name"]) for entry in entries]
    for _, path in found:
        if not path.is_file():
            raise InputError(f"{file}: the listed image {path} does not exist")
    return found


def _match_images(file: Path, content: dict[str, Any], paths: Sequence[Path]) -> list[tuple[dict[str, Any], Path]]:
    names = [Path(entry["file_name"]).name for entry in content["images"]]
    _check_unique(file, "image file", names)
    entries = dict(zip(names, content["images"], strict=True))
    for path in paths:
        if path.name not in entries:
            raise InputError(f"{file}: the image {path} of the split is not listed there")
    return [(entries[path.name], path) for path in paths]


def load_coco(file: Path) -> dict[str, Any]:
    """Read a COCO JSON and check that its parts refer to one another.

    Raises:
        InputError: It is missing, not JSON, lacks a key, or an entry is wrong; the entry is named.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: the annotation file does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: the annotation file is not readable JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{file}: not a COCO annotation file, the list '{key}' is missing")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise InputError(f"{file}: every entry of '{key}' must be an object")
    if not content["categories"]:
        raise InputError(f"{file}: the list of classes ('categories') is empty")
    _check_images(file, content["images"])
    for entry in content["categories"]:
        if not _is_int(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise InputError(f"{file}: a category needs an integer 'id' and a 'name', got {_short(entry)}")
    _check_unique(file, "category", (entry["id"] for entry in content["categories"]))
    _check_annotations(file, content)
    return content


def _check_images(file: Path, images: list[dict[str, Any]]) -> None:
    if not images:
        raise InputError(f"{file}: the list of images is empty")
    for entry in images:
        sized = _is_positive(entry.get("width")) and _is_positive(entry.get("height"))
        if not sized or not _is_int(entry.get("id")) or not isinstance(entry.get("file_name"), str):
            raise InputError(f"{file}: an image needs 'id', 'file_name', 'width' and 'height', got {_short(entry)}")
    _check_unique(file, "image", (entry["id"] for entry in images))


def _check_annotations(file: Path, content: dict[str, Any]) -> None:
    image_ids = {entry["id"] for entry in content["images"]}
    category_ids = {entry["id"] for entry in content["categories"]}
    ids = [entry.get("id") for entry in content["annotations"]]
    # pycocotools takes annotation id 0 for "unmatched", and equal ids for one object.
    renumber = not all(_is_positive(i) for i in ids) or len(set(ids)) < len(ids)
    for index, entry in enumerate(content["annotations"]):
        where = f"{file}: annotation {entry.get('id', f'number {index}')}"
        if not _is_int(entry.get("image_id")) or entry["image_id"] not in image_ids:
            raise InputError(f"{where} names image {entry.get('image_id')!r}, which the file does not list")
        if not _is_int(entry.get("category_id")) or entry["category_id"] not in category_ids:
            raise InputError(f"{where} names category {entry.get('category_id')!r}, which the file does not list")
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
            raise InputError(f"{where}: 'bbox' must be four finite numbers, got {_short(box)}")
        if min(box[2:]) < 0:
            raise InputError(f"{where}: 'bbox' has a negative width or height: {box}")
        entry.setdefault("iscrowd", 0)
        entry.setdefault("area", box[2] * box[3])
        if renumber:
            entry["id"] = index + 1


def _match_classes(
    file: Path, categories: list[dict[str, Any]], class_names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    ids = {entry["name"].strip(): entry["id"] for entry in sorted(categories, key=lambda entry: entry["id"])}
    if len(ids) < len(categories):
        raise InputError(f"{file}: two categories have the same name")
    if class_names is None:
        return tuple(ids), tuple(ids.values())
    for name in class_names:
        if name not in ids:
            raise InputError(f"{file}: there is no category for the dataset's class '{name}'")
    for name in ids:
        if name not in class_names:
            raise InputError(f"{file}: the category '{name}' is not among the dataset's class names")
    return class_names, tuple(ids[name] for name in class_names)


def _training_boxes(
    annotations: list[dict[str, Any]], images: Sequence[ImageRecord], category_ids: tuple[int, ...]
) -> tuple[tuple[NDArray[np.float32], ...], tuple[NDArray[np.int64], ...]]:
    class_of = {category_id: index for index, category_id in enumerate(category_ids)}
    sizes = {image.image_id: (image.width, image.height) for image in images}
    boxes: dict[int, list[list[float]]] = {image.image_id: [] for image in images}
    classes: dict[int, list[int]] = {image.image_id: [] for image in images}
    for entry in annotations:
        x, y, w, h = entry["bbox"]
        width, height = sizes[entry["image_id"]]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if entry["iscrowd"] or x1 <= x0 or y1 <= y0:
            continue
        boxes[entry["image_id"]].append([x0, y0, x1, y1])
        classes[entry["image_id"]].append(class_of[entry["category_id"]])
    return (
        tuple(np.array(boxes[image.image_id], np.float32).reshape(-1, 4) for image in images),
        tuple(np.array(classes[image.image_id], np.int64) for image in images),
    )


def _check_unique(file: Path, what: str, values: Iterable[object]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise InputError(f"{file}: the {what} {value} is listed twice")
        seen.add(value)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return _is_int(value) and value > 0


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
