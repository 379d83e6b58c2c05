"""How the images of a calibration subset are chosen: at random, by classes, or by coverage."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def seeded_order(names: Sequence[str], seed: int) -> list[int]:
    """The images in an order that depends on their names and the seed, not on the order in which they were listed.

    Its first images are the random subset. For the other methods it decides between equals.
    """
    by_name = sorted(range(len(names)), key=names.__getitem__)
    return [by_name[place] for place in np.random.default_rng(seed).permutation(len(names))]


def count_objects(classes: Sequence[NDArray[np.int64]], class_count: int) -> NDArray[np.int64]:
    """Objects by image and class, int64 `[N, C]`."""
    counts = [np.bincount(image, minlength=class_count) for image in classes]
    return np.array(counts, np.int64).reshape(len(classes), class_count)


def balance(objects: NDArray[np.int64], count: int) -> list[int]:
    """Choose images so that each class is shown by about as many of them, as far as there are images.

    With n_c chosen images that show class c and C classes, uneven(n) = C sum_c n_c^2 - (sum_c n_c)^2, which is C^2
    times the variance of n; o_c counts objects instead. Each step serves the class of the smallest n_c that has images
    left (of equals the one that the fewest images of the split show: rare classes first), and takes, of the images that
    show it, the one that leaves the smallest uneven(n), then the smallest uneven(o), then the first. Images without
    objects come last.

    Args:
        objects: Objects by image and class, int64 `[N, C]`; the order of images decides between equals.
        count: How many to choose, at most N.

    Returns:
        Indices of images in the order of choice.
    """
    objects = objects[:, objects.any(axis=0)]  # a class that the split never shows can be no more even than it is
    shown = (objects > 0).astype(np.int64)
    left, totals = np.ones(len(objects), bool), shown.sum(axis=0)
    remaining, images_of, objects_of = totals.copy(), np.zeros_like(totals), np.zeros_like(totals)
    chosen: list[int] = []
    while len(chosen) < count and remaining.any():
        classes = np.flatnonzero(remaining)
        served = classes[np.lexsort((totals[classes], images_of[classes]))[0]]
        candidates = np.flatnonzero(left & (shown[:, served] > 0))
        by_images = _unevenness_added(images_of, shown[candidates])
        by_objects = _unevenness_added(objects_of, objects[candidates])
        pick = int(candidates[np.lexsort((by_objects, by_images))[0]])
        chosen.append(pick)
        left[pick] = False
        remaining -= shown[pick]
        images_of += shown[pick]
        objects_of += objects[pick]
    return [*chosen, *map(int, np.flatnonzero(left)[: count - len(chosen)])]


def _unevenness_added(counts: NDArray[np.int64], added: NDArray[np.int64]) -> NDArray[np.int64]:
    """By how much uneven(counts), see `balance`, grows with each row of `added`, int64 `[K, C]`."""
    squares = (2 * counts * added + added * added).sum(axis=1)
    sums = added.sum(axis=1)
    return np.asarray(len(counts) * squares - (2 * counts.sum() + sums) * sums, np.int64)


def spread(descriptors: NDArray[np.float32], count: int) -> list[int]:
    """Choose images so that every image has a chosen one nearby: greedy k-center (Gonzalez 1985).

    Descriptors are standardised by dimension. The first image is the one nearest to the mean of all; each further one
    is the farthest from all chosen before. The largest distance left is at most twice that of the best choice.

    Args:
        descriptors: float32 `[N, D]`; the order of images decides between equals.
        count: How many to choose, at most N.

    Returns:
        Indices of images in the order of choice.
    """
    points = _standardised(descriptors)
    chosen = [int(np.argmin((points**2).sum(axis=1)))]
    distance = np.full(len(points), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        distance[chosen] = -1  # below that of another image which is the same
        chosen.append(int(np.argmax(distance)))
    return chosen


def _standardised(descriptors: NDArray[np.float32]) -> NDArray[np.float64]:
    centred = descriptors - descriptors.mean(axis=0, dtype=np.float64)
    deviation = centred.std(axis=0)
    return np.asarray(centred / np.where(deviation > 0, deviation, 1), np.float64)
