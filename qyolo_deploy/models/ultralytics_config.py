"""The model YAMLs of ultralytics: found, read, and checked before ultralytics builds them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import parse_activation
from qyolo_deploy.models.ultralytics_env import import_ultralytics

# A config can come out of a checkpoint, and ultralytics would import and evaluate what its rows name.
_LAYERS = """
A2C2f ADown AConv AIFI Bottleneck BottleneckCSP C1 C2 C2PSA C2f C2fCIB C2fPSA C3 C3Ghost C3k2 C3x CBFuse
CBLinear Concat Conv Conv2 ConvTranspose DWConv DWConvTranspose2d Detect ELAN1 Focus GhostBottleneck
GhostConv PSA RepC3 RepConv RepNCSPELAN4 SCDown SPP SPPELAN SPPF nn.Conv2d nn.ConvTranspose2d nn.Identity
nn.MaxPool2d nn.Upsample nn.ZeroPad2d v10Detect
"""
LAYERS = frozenset(_LAYERS.split())
_NAME = re.compile(r"(?P<stem>yolo(?:v)?\d+)(?P<scale>[nslmx])(?P<rest>(?:-[a-z0-9]+)*)u?")


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config with layers, activations or keys that are not those of a detection model.

    Raises:
        InputError: Names the layer or key.
    """
    rows = [row for key in ("backbone", "head") for row in _rows(config, key)]
    for index, (_, _, name, _) in enumerate(rows):
        if name not in LAYERS:
            raise InputError(
                f"Layer {index} of the model's config is a '{name}', which no supported detection model has.",
                hint="Segmentation, pose, classification and open-vocabulary models are not supported.",
            )
    if rows[-1][2] not in ("Detect", "v10Detect"):
        raise InputError(f"The last layer of the model's config is '{rows[-1][2]}' and not Detect.")
    if not isinstance(config.get("nc"), int) or config["nc"] < 1:
        raise InputError("The key 'nc' of the model's config must be a positive number of classes.")
    if config.get("channels", config.get("ch", 3)) != 3:
        raise InputError("The model's config takes other images than those with three channels.")
    if config.get("activation"):
        parse_activation(config["activation"])


def _rows(config: Mapping[str, Any], key: str) -> list[list[Any]]:
    rows = config.get(key)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"The key '{key}' of the model's config must be a list of layers.")
    for row in rows:
        if not isinstance(row, list) or len(row) != 4 or not isinstance(row[2], str):
            raise InputError(f"A row of '{key}' in the model's config is not [from, repeats, name, arguments].")
    return rows


def read_config(source: str | Path) -> dict[str, Any]:
    """Read a model YAML by path, or one that ultralytics packages by its name with the scale ("yolo11n").

    Raises:
        InputError: There is no such file or name, or it is not a mapping.
    """
    path = Path(source)
    scale = _NAME.fullmatch(path.stem)
    if path.suffix not in (".yaml", ".yml"):
        path = _packaged(str(source))
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"The model config {path} does not exist.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The model config {path} is not a readable YAML file.") from error
    if not isinstance(config, dict):
        raise InputError(f"The model config {path} is not a mapping.")
    if config.get("scales") and not config.get("scale"):
        config["scale"] = scale["scale"] if scale else next(iter(config["scales"]))
    return config


def _packaged(name: str) -> Path:
    """Return the YAML that ultralytics packages for a name such as "yolo11n"."""
    folder = Path(str(import_ultralytics().__file__)).parent / "cfg" / "models"
    match = _NAME.fullmatch(name)
    stems = [name] + ([match["stem"] + match["rest"]] if match else [])
    for stem in stems:
        found = sorted(path for path in folder.glob("*/*.yaml") if path.stem == stem)
        if found:
            return found[0]
    raise InputError(
        f"There is no architecture '{name}'.",
        hint="Name one with its scale, such as yolov8n or yolo11n, or give the path of a model YAML.",
    )
