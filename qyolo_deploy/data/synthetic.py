"""The embedded default data: a seeded detection dataset that is generated instead of downloaded."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import yaml

from qyolo_deploy.data.synthetic_scene import CLASS_NAMES, SMALLEST_PX, SceneObject, draw_scene
from qyolo_deploy.errors import InputError

# Part of what identifies a dataset: raise it with every change of a pixel or a box.
GENERATOR_VERSION = 1
JPEG_QUALITY = 92
DATASET_FILE = "synthetic.yaml"
PARAMETERS_FILE = "synthetic.json"

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class _Parameters:
    seed: int
    train_images: int
    val_images: int
    imgsz: int
    version: int = GENERATOR_VERSION

    def __post_init__(self) -> None:
        for key in ("train_images", "val_images"):
            if getattr(self, key) < 1:
                raise InputError(f"synthetic data: {key} must be at least 1, not {getattr(self, key)}")
        if self.imgsz < 4 * SMALLEST_PX:
            raise InputError(f"synthetic data: imgsz must be at least {4 * SMALLEST_PX:.0f}, not {self.imgsz}")
        if self.seed < 0:
            raise InputError(f"synthetic data: seed must not be negative, but is {self.seed}")


def generate(
    root: Path,
    *,
    seed: int,
    train_images: int,
    val_images: int,
    imgsz: int,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the dataset to `root`, or find it there already.

    Every image is drawn from its own seed (seed, split, index), so that the order of drawing does not matter,
    a longer training split begins with the shorter one's images, and no image is in both splits. The files
    appear under `root` all at once, when the last one is written.

    Args:
        root: Folder of the dataset; replaced if it holds synthetic data of other parameters.
        seed: Seed of the whole dataset.
        train_images: Number of training images.
        val_images: Number of validation images.
        imgsz: Side of the square images in px.
        progress: Called with (images done, images in all).

    Returns:
        Path of the dataset YAML.

    Raises:
        InputError: A parameter is out of range, `root` holds something else, or it cannot be written.
    """
    parameters = _Parameters(seed, train_images, val_images, imgsz)
    if _is_complete(root, parameters):
        return root / DATASET_FILE
    if root.exists() and not (root / PARAMETERS_FILE).is_file() and not _is_empty_folder(root):
        raise InputError(
            f"{root}: holds something else than synthetic data, which is not overwritten",
            hint="Choose another folder, or remove this one.",
        )
    partial_root = root.with_name(f".{root.name}.partial")
    try:
        shutil.rmtree(partial_root, ignore_errors=True)
        partial_root.mkdir(parents=True)
        _write(partial_root, parameters, progress)
        if root.exists():
            shutil.rmtree(root)
        partial_root.rename(root)
    except OSError as error:
        raise InputError(
            f"{root}: synthetic data could not be written there ({error.strerror or error})",
            hint="Check the folder's permissions and the free space.",
        ) from error
    finally:
        shutil.rmtree(partial_root, ignore_errors=True)
    return root / DATASET_FILE


def _is_empty_folder(root: Path) -> bool:
    return root.is_dir() and not any(root.iterdir())


def _is_complete(root: Path, parameters: _Parameters) -> bool:
    try:
        recorded = json.loads((root / PARAMETERS_FILE).read_text(encoding="utf-8"))
        counts = [len(list((root / "images" / split).iterdir())) for split in _SPLITS]
    except (OSError, ValueError):
        return False
    expected = [parameters.train_images, parameters.val_images]
    return bool(recorded == asdict(parameters)) and counts == expected and (root / DATASET_FILE).is_file()


def _write(root: Path, parameters: _Parameters, progress: Callable[[int, int], None] | None) -> None:
    counts = {"train": parameters.train_images, "val": parameters.val_images}
    total, done = sum(counts.values()), 0
    (root / "annotations").mkdir()
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16)) as pool:
        for number, split in enumerate(_SPLITS):
            for folder in ("images", "labels"):
                (root / folder / split).mkdir(parents=True)
            draw = partial(_write_image, root, split, (parameters.seed, number), parameters.imgsz)
            scenes = []
            for scene in pool.map(draw, range(counts[split])):
                scenes.append(scene)
                done += 1
                if progress is not None:
                    progress(done, total)
            annotations = root / "annotations" / f"instances_{split}.json"
            annotations.write_text(json.dumps(_coco(scenes, parameters.imgsz)), encoding="utf-8")
    dataset = {"train": "images/train", "val": "images/val", "names": dict(enumerate(CLASS_NAMES))}
    (root / DATASET_FILE).write_text(yaml.safe_dump(dataset, sort_keys=False), encoding="utf-8")
    (root / PARAMETERS_FILE).write_text(json.dumps(asdict(parameters)) + "\n", encoding="utf-8")


def _write_image(root: Path, split: str, seed: tuple[int, int], imgsz: int, index: int) -> list[SceneObject]:
    image, objects = draw_scene(np.random.default_rng([*seed, index]), imgsz)
    _, jpeg = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    (root / "images" / split / f"{index:06d}.jpg").write_bytes(jpeg.tobytes())
    lines = []
    for item in objects:
        x0, y0, x1, y1 = item.box
        xywh = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
        lines.append(" ".join([str(item.class_index), *(f"{value / imgsz:.6f}" for value in xywh)]) + "\n")
    (root / "labels" / split / f"{index:06d}.txt").write_text("".join(lines), encoding="utf-8")
    return objects


def _coco(scenes: list[list[SceneObject]], imgsz: int) -> dict[str, list[dict[str, object]]]:
    """Annotations in the layout of COCO: category ids from 1, areas of the visible pixels."""
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for image_id, objects in enumerate(scenes):
        images.append({"id": image_id, "file_name": f"{image_id:06d}.jpg", "width": imgsz, "height": imgsz})
        for item in objects:
            x0, y0, x1, y1 = item.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": item.class_index + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": item.area_px,
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
    categories: list[dict[str, object]] = [
        {"id": index + 1, "name": name, "supercategory": "shape"} for index, name in enumerate(CLASS_NAMES)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}
