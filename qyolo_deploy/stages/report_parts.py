"""Parts of `report.json` that tell where the numbers come from: layers, calibration, how to make them again."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from qyolo_deploy import __version__
from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.data.calibration import read_calibration_set
from qyolo_deploy.data.dataset import image_names, take_images
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.stages.context import StageContext
from qyolo_deploy.stages.examples import contact_sheet

_NUMBERS = re.compile(r"\[\s+([^\[\]{}\"]*?)\s+\]")


def to_text(report: Any) -> str:
    """A report as JSON, lists of numbers in one line each; what is only for the page is left out."""
    text = json.dumps(_without_pictures(report), indent=1)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def _without_pictures(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_pictures(part) for key, part in value.items() if key != "webp_base64"}
    return [_without_pictures(part) for part in value] if isinstance(value, list) else value


def shorten_numbers(value: Any) -> Any:
    """JSON data with numbers of 6 digits: traces are thousands of them. What is no number becomes null."""
    if isinstance(value, dict):
        return {key: shorten_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shorten_numbers(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def describe_layers(context: StageContext, quantized: QuantizedModel) -> list[dict[str, Any]]:
    """Bits and scales of each quantized layer; its weight scales as least, median and greatest of the channels."""
    layers = []
    for told in context.artifacts["train"].info["layers"]:
        layer = quantized.layers[told["name"]]
        qparams = quantized.activations[layer.input]
        ends = np.quantile(layer.qparams.scale, (0.0, 0.5, 1.0)).tolist()
        layers.append(
            {
                **told,
                "weights": int(layer.weight.size),
                "weight_scale": dict(zip(("min", "median", "max"), ends, strict=True)),
                "input_scale": float(qparams.scale),
                "input_zero_point": int(qparams.zero_point),
            }
        )
    shortened: list[dict[str, Any]] = shorten_numbers(layers)
    return shortened


def describe_calibration(context: StageContext) -> dict[str, Any]:
    """Which images set the scales."""
    data, dataset = context.recipe.data, context.calibration_data()
    used = min(data.calibration_images, len(dataset))
    told: dict[str, Any] = {"images": used, "imgsz": context.recipe.model.imgsz, "letterbox": "square"}
    if context.calibration is None:
        told |= {"method": "random", "seed": context.recipe.train.seed, "source": "training split"}
        return told | {"of_images": len(dataset), "digest": context.artifacts["data"].info["train"]["digest"]}
    chosen = read_calibration_set(context.calibration)
    summary = chosen.summary()
    told |= {key: summary[key] for key in ("name", "method", "seed", "digest")}
    told |= {"source": f"{chosen.source.dataset}, training split", "of_images": len(dataset)}
    pictures = contact_sheet(take_images(dataset, range(used)))
    return told | {"files": image_names(dataset)[:used], "webp_base64": pictures}


def describe_making(context: StageContext) -> dict[str, Any]:
    """Commands that make and prove the same again, and digests of what goes in."""
    recipe = "recipe.resolved.yaml"
    data = context.recipe.data.source
    section = context.recipe.validate_
    options = f"--imgsz {context.recipe.model.imgsz} --conf {section.conf:g} --iou {section.iou:g}"
    where = "data" if context.source is None else shlex.quote(data)
    built = context.artifacts["export"].info["engines"]
    engines = [built[target] for target in context.recipe.export.targets if target in built]
    commands = [
        ("Install", f'pip install "qyolo_deploy[build]=={__version__}"'),
        ("Build", f"qyolo build {recipe}"),
        ("Verify the release", "qyolo verify release"),
        *(("Measure an engine", f"qyolo validate {shlex.quote(path)} --data {where} {options}") for path in engines),
    ]
    return {
        "commands": [{"what": what, "command": command} for what, command in commands],
        "digests": {"recipe": sha256_file(context.folder / recipe), **_inputs(context)},
    }


def _inputs(context: StageContext) -> dict[str, str]:
    """Digests of the files outside the build, by what they are."""
    found = {}
    for stage in ("data", "float"):
        for name, digest in context.artifacts[stage].inputs.items():
            if stage == "data" or name not in context.artifacts:
                found[f"{name} images" if name in ("train", "val", "unlabeled") else name] = digest
    return found


def read_diagnostics(folder: Path) -> dict[str, Any]:
    """What training tells about oscillations; nothing where an older build did not record it."""
    path = folder / "diagnostics.json"
    found: dict[str, Any] = shorten_numbers(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    return found
