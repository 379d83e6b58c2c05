"""Finds the views of a model that a command names: engine files, checkpoints, and what a build folder holds."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from qyolo_deploy.artifact import Artifact
from qyolo_deploy.engines.base import OPENVINO_SUFFIX
from qyolo_deploy.errors import InputError, RuntimeMissingError
from qyolo_deploy.recipe import Recipe
from qyolo_deploy.recipe_file import load_recipe
from qyolo_deploy.stages.tensors import TensorSource

_SEPARATOR = "@"
_HINTS = ("f32", "bf16", "f16")
_CHECKPOINTS = (".pt", ".safetensors")
FAKE_QUANTIZED, FLOAT = "fake_quantized", "float"


def open_view(text: str) -> TensorSource:
    """Opens a view for looking inside.

    Args:
        text: An `.onnx`; an OpenVINO folder or .xml, also with `@bf16`; a `.safetensors` of float or quantized
            weights, or a .pt; a build folder, with `@float`, `@fake_quantized` (which is the default),
            `@onnxruntime` or `@openvino`.

    Raises:
        InputError: There is no such view.
        RuntimeMissingError: A package that it needs is not installed.
    """
    path, chosen = _split(text)
    if not path.exists():
        raise InputError(f"{text}: no such file or folder")
    if is_build(path):
        return _of_build(path, chosen or FAKE_QUANTIZED)
    if path.suffix == ".xml" or path.is_dir():
        if chosen not in ("", *_HINTS):
            raise InputError(f"{text}: expected one of {', '.join(_HINTS)} behind {_SEPARATOR}")
        return _openvino(text, path, chosen or "f32")
    if chosen:
        raise InputError(f"{text}: only build folders and OpenVINO models take {_SEPARATOR}{chosen}")
    if path.suffix == ".onnx":
        return _onnx(text, path)
    if path.suffix in _CHECKPOINTS:
        return _of_checkpoint(text, path, None)
    raise InputError(f"{text}: expected an .onnx, an OpenVINO folder, .safetensors, .pt or a build folder")


def _split(text: str) -> tuple[Path, str]:
    """Path and what follows it; a path may itself hold the separator."""
    path, _, chosen = text.rpartition(_SEPARATOR)
    return (Path(text), "") if not path or Path(text).exists() else (Path(path), chosen)


def is_build(path: Path) -> bool:
    """Whether a folder is that of a build."""
    return (path / "recipe.resolved.yaml").is_file() and (path / ".stages").is_dir()


def build_recipe(folder: Path) -> Recipe:
    """The recipe that a build was made by.

    Raises:
        InputError: The folder is not that of a build, or its recipe is of another version of this package.
    """
    if not is_build(folder):
        raise InputError(f"{folder}: not a build folder, expected one that `qyolo build` has made")
    return load_recipe(folder / "recipe.resolved.yaml")


def stage_info(folder: Path, stage: str) -> dict[str, Any]:
    """What a stage of a build has recorded.

    Raises:
        InputError: The stage has not run.
    """
    try:
        text = (folder / ".stages" / f"{stage}.json").read_text(encoding="utf-8")
        return dict(Artifact.from_json(json.loads(text)).info)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its stage {stage} has not run", hint=f"qyolo build --until {stage}") from error


def _of_build(folder: Path, view: str) -> TensorSource:
    engines = {} if view in (FLOAT, FAKE_QUANTIZED) else stage_info(folder, "export")["engines"]
    label = f"{folder}{_SEPARATOR}{view}"
    if view in (FLOAT, FAKE_QUANTIZED):
        file = folder / ("float" if view == FLOAT else "correct") / "model.safetensors"
        if not file.is_file():
            raise InputError(f"{label}: {file} is missing")
        return _of_checkpoint(label, file, _imgsz_of(folder))
    if view not in engines:
        known = [FLOAT, FAKE_QUANTIZED, *(name for name in engines if name != FLOAT)]
        raise InputError(f"{label}: expected one of {', '.join(known)} behind {_SEPARATOR}")
    source = open_engine_view(label, folder / engines[view])
    if source is None:
        raise InputError(f"{label}: there is no looking inside engines of this kind")
    return source


def open_engine_view(label: str, engine: Path) -> TensorSource | None:
    """An engine of a build; None if it is of a kind that cannot be looked into."""
    if engine.suffix == ".onnx":
        return _onnx(label, engine)
    return _openvino(label, engine) if engine.name.endswith(OPENVINO_SUFFIX) else None


def _imgsz_of(folder: Path) -> int:
    """From the recipe as data: builds of older versions may be looked at too."""
    model = yaml.safe_load((folder / "recipe.resolved.yaml").read_text(encoding="utf-8"))["model"]
    return int(model["imgsz"])


def _onnx(label: str, path: Path) -> TensorSource:
    source: TensorSource = build_side("tensors_onnx", label).OnnxTensors(label, path)
    return source


def _openvino(label: str, path: Path, precision_hint: str = "f32") -> TensorSource:
    source: TensorSource = build_side("tensors_openvino", label).OpenVinoTensors(label, path, precision_hint)
    return source


def _of_checkpoint(label: str, path: Path, imgsz: int | None) -> TensorSource:
    source: TensorSource = build_side("tensors_torch", label).checkpoint_tensors(label, path, imgsz)
    return source


def build_side(module: str, what: str) -> Any:
    """A module of `stages` that needs packages of the build side, imported only by who asks for it.

    Raises:
        RuntimeMissingError: One of them is not installed.
    """
    try:
        return import_module(f"qyolo_deploy.stages.{module}")
    except ModuleNotFoundError as error:
        message = f"{what}: needs the package '{error.name}', which is not installed"
        raise RuntimeMissingError(message, hint='pip install "qyolo_deploy[build]"') from error
