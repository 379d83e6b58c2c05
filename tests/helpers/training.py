"""Loaders of small batches, and comparisons of what came out of two runs."""

import torch

from qyolo_deploy.recipe import AugmentSection
from qyolo_deploy.training.loader import Loader

IMGSZ = 64
TENSORS = ("img", "cls", "bboxes", "batch_idx")


class Stop(Exception):
    """The power cut."""


def make_loader(dataset, seed=0, batch=4, images=None, workers=0, **augment):
    section = AugmentSection(**augment)
    return Loader(dataset, imgsz=IMGSZ, batch=batch, augment=section, images=images, workers=workers, seed=seed)


def same_batches(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in TENSORS
    )


def assert_same_state(left, right):
    assert set(left) == set(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def without_times(history):
    return [{key: value for key, value in entry.items() if key not in ("seconds", "images_per_s")} for entry in history]
