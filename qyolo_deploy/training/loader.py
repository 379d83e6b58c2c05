"""Batches of augmented training images, the same for the same seed and epoch."""

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qyolo_deploy.data.dataset import DetectionDataset
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.models.ultralytics_env import import_ultralytics
from qyolo_deploy.recipe import AugmentSection, TrainingSection

Batch = Mapping[str, Tensor]


def training_images(dataset: DetectionDataset, imgsz: int, augment: AugmentSection | None) -> Dataset[dict[str, Any]]:
    """The dataset behind ultralytics' augmentation pipeline.

    Labels come from `dataset`, so nothing is scanned and no cache is written beside the images.

    Args:
        dataset: The training split.
        imgsz: Side of the square training images in pixels.
        augment: None leaves the images as they are, letterboxed.
    """
    import_ultralytics()
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import YOLODataset

    class Images(YOLODataset):
        """Takes files and labels from the loaded dataset instead of looking for them."""

        def get_img_files(self, img_path: str | list[str]) -> list[str]:
            return list(img_path)

        def get_labels(self) -> list[dict[str, Any]]:
            return [_label(dataset, index) for index in range(len(dataset.images))]

    # What is not a key of the recipe stays at ultralytics' default.
    overrides = {} if augment is None else augment.model_dump(exclude={"close_mosaic"})
    return Images(
        img_path=[str(image.path) for image in dataset.images],
        imgsz=imgsz,
        augment=augment is not None,
        hyp=get_cfg(overrides=overrides),
        data={"names": dict(enumerate(dataset.class_names)), "channels": 3},
    )


def _label(dataset: DetectionDataset, index: int) -> dict[str, Any]:
    image, boxes = dataset.images[index], dataset.boxes[index]
    size = np.array([image.width, image.height] * 2, np.float32)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return {
        "im_file": str(image.path),
        "shape": (image.height, image.width),
        "cls": dataset.classes[index].astype(np.float32)[:, None],
        "bboxes": np.concatenate([centres, boxes[:, 2:] - boxes[:, :2]], 1) / size,
        "segments": [],
        "keypoints": None,
        "normalized": True,
        "bbox_format": "xywh",
    }


class Loader:
    """Shuffled batches of one epoch at a time.

    Args:
        dataset: The training split.
        imgsz: Side of the training images in pixels.
        batch: Images of a batch; the last, smaller batch of an epoch is left out unless it is the only one.
        augment: See `training_images`.
        images: Use only this many images, chosen by seed.
        workers: Processes that read and augment; 0 does it in this one.
        seed: Decides subset, order and augmentation.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        imgsz: int,
        batch: int,
        augment: AugmentSection | None,
        images: int | None,
        workers: int,
        seed: int,
    ) -> None:
        self._data: Any = training_images(dataset, imgsz, augment)
        chosen = np.random.default_rng(seed).permutation(len(dataset))[:images]
        self._indices = sorted(int(index) for index in chosen)
        self._batch = min(batch, len(self._indices))
        self._workers, self._seed = workers, seed

    @classmethod
    def of(cls, dataset: DetectionDataset, section: TrainingSection, imgsz: int) -> "Loader":
        """The loader of a training section."""
        return cls(
            dataset,
            imgsz=imgsz,
            batch=section.batch,
            augment=section.augment,
            images=section.images,
            workers=section.workers,
            seed=section.seed,
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._indices) // self._batch

    def close_mosaic(self) -> None:
        """Switches mosaic off for the rest of the run, as ultralytics does in the last epochs."""
        for transform in self._data.transforms.transforms[0].transforms:
            if hasattr(transform, "border") and hasattr(transform, "p"):
                transform.p = 0.0

    def epoch(self, number: int) -> Iterator[Batch]:
        """Batches of an epoch: `img` float32 `[N, 3, H, W]` in 0..1, `cls`, `bboxes`, `batch_idx`."""
        seed = (self._seed * 1_000_003 + number) % 2**31
        _seed_everything(seed)
        # What an earlier epoch left would make a resumed run another one. Both go: mosaic draws from the buffer,
        # which an image enters only when it is read and not when it is still in memory.
        self._data.buffer.clear()
        self._data.ims = [None] * len(self._data.ims)
        order = torch.randperm(len(self._indices), generator=torch.Generator().manual_seed(seed)).tolist()
        loader = DataLoader(
            self._data,
            batch_size=self._batch,
            sampler=[self._indices[index] for index in order],
            num_workers=self._workers,
            drop_last=True,
            collate_fn=self._data.collate_fn,
            worker_init_fn=lambda worker: _seed_everything(seed + 7919 * (worker + 1)),
        )
        for batch in loader:
            batch["img"] = batch["img"].float() / 255
            yield batch


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - ultralytics' augmentation draws from the global generator
    torch.manual_seed(seed)


def calibration_batches(dataset: DetectionDataset, images: int, imgsz: int, batch: int, seed: int) -> Iterable[Tensor]:
    """Square letterboxed images of the training split, float32 `[N, 3, imgsz, imgsz]`, chosen by seed."""
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:images]
    for start in range(0, len(chosen), batch):
        group = [dataset.images[index] for index in chosen[start : start + batch]]
        yield torch.from_numpy(
            np.concatenate([to_tensor(letterbox(read_image(image.path), imgsz, rect=False)[0]) for image in group])
        )
