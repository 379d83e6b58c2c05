"""Batches of augmented training images, the same for the same seed and epoch."""

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qyolo_deploy.data.dataset import DetectionDataset, take_images
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.errors import InputError
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


class _Samples(Dataset[dict[str, Any]]):
    """Draws each sample's augmentation from a seed of its own.

    So a sample is the same whoever reads it and whatever was read before: after a resume, in a worker process, or in
    another process of a distributed run.
    """

    def __init__(self, data: Any, labeled: int, seed: int) -> None:
        self._data, self._labeled, self._seed = data, labeled, seed
        self.epoch = 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = np.random.SeedSequence([self._seed, self.epoch, index]).generate_state(1)
        _seed_everything(int(draw[0]))
        sample: dict[str, Any] = self._data[index]
        return sample | {"labeled": index < self._labeled}


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
        shard: Number of this process and count of all that share each batch.
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
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        chosen = sorted(np.random.default_rng(seed).permutation(len(dataset))[:images].tolist())
        labeled = sum(index < (len(dataset) if dataset.labeled is None else dataset.labeled) for index in chosen)
        self._data: Any = training_images(take_images(dataset, chosen), imgsz, augment)
        for mosaic in self._mosaics():
            # Partners out of what was read last would depend on the past.
            mosaic.buffer_enabled = False
        self._samples = _Samples(self._data, labeled, seed)
        self._shard = shard
        self._images, self._batch = len(chosen), min(batch, len(chosen))
        self._workers, self._seed = workers, seed
        if self._batch % shard[1]:
            raise InputError(f"batch is {self._batch}, expected a multiple of the {shard[1]} processes that share it")

    @classmethod
    def of(
        cls, dataset: DetectionDataset, section: TrainingSection, imgsz: int, shard: tuple[int, int] = (0, 1)
    ) -> "Loader":
        """The loader of a training section."""
        return cls(
            dataset,
            imgsz=imgsz,
            batch=section.batch,
            augment=section.augment,
            images=section.images,
            workers=section.workers,
            seed=section.seed,
            shard=shard,
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._images // self._batch

    def close_mosaic(self) -> None:
        """Switches mosaic off for the rest of the run, as ultralytics does in the last epochs."""
        for mosaic in self._mosaics():
            mosaic.p = 0.0

    def _mosaics(self) -> Iterable[Any]:
        first = self._data.transforms.transforms[0]
        return [transform for transform in getattr(first, "transforms", ()) if hasattr(transform, "buffer_enabled")]

    def epoch(self, number: int) -> Iterator[Batch]:
        """Batches of an epoch, or this process's part of each.

        `img` float32 `[N, 3, H, W]` in 0..1, `cls`, `bboxes`, `batch_idx`, `labeled` (N booleans).
        """
        self._samples.epoch = number
        order = np.random.default_rng([self._seed, number]).permutation(self._images)
        rank, world = self._shard
        loader = DataLoader(
            self._samples,
            batch_sampler=[
                order[start : start + self._batch].tolist()[rank::world]
                for start in range(0, len(self) * self._batch, self._batch)
            ],
            num_workers=self._workers,
            collate_fn=self._data.collate_fn,
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
