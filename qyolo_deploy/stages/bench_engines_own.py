"""Our own engines for `qyolo bench engines`, from float weights by range search alone: a recipe without training."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.errors import InputError
from qyolo_deploy.stages.bench_engines_subjects import Subject, with_hints

_SCHEME = re.compile(r"w([2-8])a([2-8])")
_STORAGES = {2: "int2", 3: "int4", 4: "int4"}
RECIPE = "own"  # the same for all schemes, so that they share what does not depend on it


def parse_schemes(text: str) -> list[str]:
    """Schemes such as `w4a8` from a list with commas.

    Raises:
        InputError: One is none.
    """
    schemes = [word.strip() for word in text.split(",") if word.strip()]
    for scheme in schemes:
        if not _SCHEME.fullmatch(scheme):
            raise InputError(f"scheme '{scheme}': expected w<bits>a<bits> with 2 to 8 bits, such as w4a8")
    return list(dict.fromkeys(schemes))


def write_recipe(folder: Path, scheme: str, checkpoint: Path, data: Path, imgsz: int, calibration_images: int) -> Path:
    """Writes the recipe of a scheme, whose build up to `export` leaves the engines.

    Args:
        folder: In which each scheme has a folder of its own.
        scheme: Such as `w4a8`.
        checkpoint: Float weights.
        data: Dataset.
        imgsz: Side of the calibration images in pixels.
        calibration_images: How many of them.
    """
    match = _SCHEME.fullmatch(scheme)
    assert match is not None
    weight_bits, activation_bits = map(int, match.groups())
    content = {
        "name": RECIPE,
        "model": {"weights": str(checkpoint.absolute()), "imgsz": imgsz},
        "data": {"source": str(data.absolute()), "calibration_images": calibration_images},
        "quantization": {
            "weights": {"bits": weight_bits, "granularity": "per_channel"},
            "activations": {"bits": activation_bits},
            "start": "ranges",
        },
        "train": {"epochs": 0},
        "correct": {"enabled": False},
        "export": {"storage": _STORAGES.get(weight_bits, "int8")},
    }
    path = folder / scheme / "recipe.yaml"
    write_atomic(path, yaml.safe_dump(content, sort_keys=False))
    return path


def own_subjects(build_folder: Path, scheme: str, hints: Sequence[str]) -> list[Subject]:
    """Rows of the engines that a build has left."""
    engines = build_folder / "engines"
    note = "ours: scales by range search, not trained"
    subjects: list[Subject] = []
    for path in sorted((engines / "onnxruntime").glob(f"*_{scheme}*.onnx")):
        subjects += with_hints(f"{scheme}-onnx", path, hints, note)
    for path in sorted((engines / "openvino").glob(f"*_{scheme}*")):
        subjects += with_hints(f"{scheme}-openvino", path, hints, note)
    return subjects
