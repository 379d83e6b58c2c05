"""`qyolo compare`: two views of a model, tensor by tensor."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.console import Tick
from qyolo_deploy.data.dataset import find_input, load_dataset, take_images
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.errors import InputError
from qyolo_deploy.stages.compare_views import open_view
from qyolo_deploy.stages.tensors import TensorSource
from qyolo_deploy.validate.parity import DEFAULT_THRESHOLD_DB, EXACT_DB, Parity, TensorErrors, TensorParity

DEFAULT_IMAGES = 16
_DEFAULT_IMGSZ = 640
_STRIDE = 32
_FORMATS = (".csv", ".json")


def compare(
    reference: str | Path,
    compared: str | Path,
    data: str | Path,
    images: int = DEFAULT_IMAGES,
    imgsz: int | None = None,
    threshold_db: float = DEFAULT_THRESHOLD_DB,
    split: str = "val",
    progress: Tick | None = None,
) -> Parity:
    """Compares two views of one model by the tensors that both have.

    Args:
        reference: See `open_view` for what may be named.
        compared: Likewise; its differences are the noise.
        data: Dataset YAML, its folder or a COCO JSON.
        images: How many of the split, evenly spread.
        imgsz: Longer side in pixels; by default what the views were made for.
        threshold_db: Below it a tensor departs, where one of the views is float.
        split: Split of the dataset.
        progress: Called with images done and in total.

    Raises:
        InputError: If a view or the data are not usable, or the two are not views of one model.
        RuntimeMissingError: If a view's runtime is not installed.
    """
    views = open_view(str(reference)), open_view(str(compared))
    size, rect = _size(views, imgsz)
    dataset = load_dataset(find_input(data), split)
    chosen = take_images(dataset, spread(dataset, images))
    return compare_sources(*views, prepared(chosen, size, rect), len(chosen), threshold_db, progress)


def compare_sources(
    reference: TensorSource,
    compared: TensorSource,
    images: Iterable[NDArray[np.float32]],
    total: int,
    threshold_db: float = DEFAULT_THRESHOLD_DB,
    progress: Tick | None = None,
) -> Parity:
    """The same for views that are open already.

    Args:
        reference: The first view.
        compared: The second.
        images: float32 `[1, 3, H, W]` in 0..1 each.
        total: How many they are.
        threshold_db: See `compare`.
        progress: Called with images done and in total.

    Raises:
        InputError: If the two have no tensor in common.
    """
    names = _common(reference, compared)
    errors = {name: TensorErrors(name, reference.grids.get(name), compared.grids.get(name)) for name in names}
    watches = reference.watch(names), compared.watch(names)
    for done, image in enumerate(images, start=1):
        left, right = (watch(image) for watch in watches)
        for name, error in errors.items():
            error.add(left.pop(name), right.pop(name))
        if progress is not None:
            progress(done, total)
    return Parity(
        reference=reference.label,
        compared=compared.label,
        images=total,
        layers=tuple(error.result() for error in errors.values()),
        both_quantized=_are_alike(reference, compared, names),
        threshold_db=threshold_db,
        only={
            one.label: tuple(name for name in one.grids if name not in errors and name not in other.grids)
            for one, other in ((reference, compared), (compared, reference))
        },
        intact_db={view.label: view.intact_db for view in (reference, compared)},
    )


def _common(reference: TensorSource, compared: TensorSource) -> list[str]:
    first, second = (reference, compared) if reference.in_order else (compared, reference)
    present = set(second.names)
    if names := [name for name in first.names if name in present]:
        return names
    raise InputError(
        f"{reference.label} and {compared.label} have no tensor in common, expected two views of one model",
        hint="Tensors are found by the names that our exports give them.",
    )


def _are_alike(reference: TensorSource, compared: TensorSource, names: Sequence[str]) -> bool:
    """Whether the views are integers of the same grids: no rounded tensor that both have has two."""
    if not reference.grids or not compared.grids:
        return False
    shared = [name for name in names if name in reference.grids and name in compared.grids]
    return all(reference.grids[name].is_like(compared.grids[name]) for name in shared)


def _size(views: Sequence[TensorSource], imgsz: int | None) -> tuple[int, bool]:
    """Longer side, and whether images need not be square."""
    fixed = {view.imgsz: view for view in views if view.imgsz is not None}
    if len(fixed) > 1:
        raise InputError(f"{' and '.join(view.label for view in fixed.values())} have inputs of different fixed sizes")
    for (height, width), view in fixed.items():
        if height != width or imgsz not in (None, height):
            raise InputError(f"{view.label}: its input is fixed to {width} x {height} px, but imgsz is {imgsz}")
        return height, False
    if imgsz is not None and (imgsz < 1 or imgsz % _STRIDE):
        raise InputError(f"imgsz is {imgsz}, expected a positive multiple of {_STRIDE}")
    known = [view.trained_imgsz for view in views if view.trained_imgsz is not None]
    return imgsz or next(iter(known), _DEFAULT_IMGSZ), True


def spread(dataset: DetectionDataset, count: int) -> list[int]:
    """Indices of so many images of a split, evenly spread.

    Raises:
        InputError: If none is asked for.
    """
    if count < 1:
        raise InputError(f"images is {count}, expected at least 1")
    chosen: list[int] = np.linspace(0, len(dataset) - 1, num=min(count, len(dataset)), dtype=int).tolist()
    return chosen


def prepared(dataset: DetectionDataset, imgsz: int, rect: bool) -> Iterator[NDArray[np.float32]]:
    """Images as networks take them, one by one: float32 `[1, 3, H, W]` in 0..1."""
    for image in dataset.images:
        yield to_tensor(letterbox(read_image(image.path), imgsz, _STRIDE, rect)[0])


def parity_table(parity: Parity) -> tuple[list[str], list[list[str]]]:
    """Head and rows for people, in order of execution; the first departure is marked."""
    head = ["", "tensor", "SQNR dB", "cosine", "largest error", "in steps", "codes that differ"]
    return head, [_row(layer, layer is parity.first_departure) for layer in parity.layers]


def _row(layer: TensorParity, departs: bool) -> list[str]:
    is_exact = layer.sqnr_db == EXACT_DB
    return [
        ">" if departs else "",
        layer.name,
        "exact" if is_exact else f"{layer.sqnr_db:.1f}",
        f"{layer.cosine:.6f}",
        f"{layer.max_error:.4g}",
        "-" if layer.max_error_steps is None else f"{layer.max_error_steps:.4g}",
        "-" if layer.differing is None else f"{layer.differing * 100:.4g} %",
    ]


def conclusions(parity: Parity) -> list[str]:
    """What the table says, in sentences."""
    lines = [f"{parity.compared} against {parity.reference}, {parity.images} images, {len(parity.layers)} tensors"]
    below = f"below {parity.threshold_db:g} dB"
    if (first := parity.first_departure) is None:
        lines.append(f"no tensor departs: {'all codes are the same' if parity.both_quantized else f'none is {below}'}")
    else:
        codes = "" if first.differing is None else f", {first.differing * 100:.3g} % of its codes differ"
        rule = "whose codes differ" if parity.both_quantized else below
        lines.append(f"first departure: {first.name}, the first tensor {rule} ({first.sqnr_db:.1f} dB{codes})")
    if (drop := parity.largest_drop) is not None:
        lines.append(f"largest drop: {drop[0].name}, {drop[1]:.1f} dB less than the tensor before it")
    for view, names in parity.only.items():
        if names:
            lines.append(f"only {view} rounds {len(names)} of the tensors, such as {names[0]}")
    for view, left in parity.intact_db.items():
        if left < EXACT_DB:
            lines.append(
                f"looking inside {view} makes it run other kernels: its outputs keep {left:.1f} dB of their own"
            )
    return lines


def write_parity(parity: Parity, path: Path) -> None:
    """Writes all numbers as JSON, or those of the tensors as CSV.

    Raises:
        InputError: If the file's name ends in neither, or it cannot be written.
    """
    check_format(path)
    if path.suffix == ".json":
        write_atomic(path, json.dumps(parity.to_json(), indent=1))
        return
    text = io.StringIO()
    rows = [asdict(layer) for layer in parity.layers]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def check_format(path: Path) -> None:
    """Refuses a file that is neither JSON nor CSV, before any work.

    Raises:
        InputError: It is one.
    """
    if path.suffix not in _FORMATS:
        raise InputError(f"--out {path}: expected a file that ends in {' or '.join(_FORMATS)}")
