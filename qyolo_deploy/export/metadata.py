"""Metadata of engine files, in the keys that `YOLO("model.onnx")` and AutoBackend of ultralytics read."""

import onnx_ir as ir

from qyolo_deploy.models.base import ModelSpec
from qyolo_deploy.recipe import NmsSection, Recipe


def engine_metadata(spec: ModelSpec, recipe: Recipe, version: str) -> dict[str, object]:
    """What the file tells its reader; nothing in it depends on when or where it was built.

    Args:
        spec: Architecture, classes and strides.
        recipe: Name, licence, image size.
        version: Version of this package.
    """
    size = recipe.model.imgsz
    return {
        "description": recipe.description or f"{recipe.name}, a quantized detector",
        "author": "qyolo_deploy",
        "version": version,
        "license": recipe.release.license,
        "stride": max(spec.strides),
        "task": "detect",
        "batch": 1,
        "imgsz": [size, size],
        "names": dict(enumerate(spec.names)),
        "channels": 3,
        "end2end": False,
        "args": {"batch": 1, "dynamic": recipe.export.dynamic, "nms": False},
    }


def tell_nms(metadata: dict[str, object], nms: NmsSection) -> dict[str, object]:
    """Metadata of a file that suppresses by itself, as exports of ultralytics with `nms=True` have them."""
    args = metadata["args"]
    assert isinstance(args, dict)
    return {**metadata, "args": {**args, "nms": True, **nms.model_dump()}}


def set_metadata(model: ir.Model, metadata: dict[str, object]) -> None:
    """Writes metadata into an ONNX model, all as strings."""
    model.metadata_props.update({key: str(value) for key, value in metadata.items()})
    model.producer_name, model.producer_version = "qyolo_deploy", str(metadata["version"])
