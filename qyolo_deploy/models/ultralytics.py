"""Anchor-free detectors of ultralytics (v3u to v12, 26) as a core and a decode; the only importer of its models."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import Detector, ModelSpec, cell_offsets, parse_activation
from qyolo_deploy.models.ultralytics_env import import_ultralytics

# A config can come out of a checkpoint, and ultralytics looks its layer names up by eval-like means.
LAYERS = frozenset(
    (
        "A2C2f ADown AConv AIFI BottleneckCSP Bottleneck C1 C2 C2PSA C2f C2fCIB C2fPSA C3 C3Ghost C3k2 C3x CBFuse "
        "CBLinear Concat Conv Conv2 ConvTranspose DWConv DWConvTranspose2d Detect ELAN1 Focus GhostBottleneck "
        "GhostConv PSA RepC3 RepConv RepNCSPELAN4 SCDown SPP SPPELAN SPPF nn.Conv2d nn.ConvTranspose2d nn.Identity "
        "nn.MaxPool2d nn.Upsample nn.ZeroPad2d v10Detect"
    ).split()
)
_NAME = re.compile(r"(?P<stem>yolo(?:v)?\d+)(?P<scale>[nslmx])(?P<rest>(?:-[a-z0-9]+)*)u?")


class UltralyticsCore(nn.Module):
    """The layers up to the head's last convolutions, with ultralytics' tensor names.

    Heads with a one-to-one branch (26, v10) keep that branch alone; it is what they detect with.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.model = layers
        head = self._head()
        self._one_to_one = getattr(head, "one2one_cv2", None) is not None
        if self._one_to_one:
            head.cv2 = head.cv3 = None

    def _head(self) -> Any:
        return self.model[len(self.model) - 1]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return (box_0, class_0, box_1, class_1, ...) for images float32 `[N, 3, H, W]` in 0..1.

        A box map is float32 `[N, 4 * reg_max, h, w]`, a class map `[N, nc, h, w]` of logits.
        """
        outputs: list[Any] = []
        x: Any = images
        for layer in self.model:
            source: Any = layer.f
            if source != -1:
                x = _route(x, outputs, source)
            if layer.i == len(self.model) - 1:
                break
            x = layer(x)
            outputs.append(x)
        head = self._head()
        boxes = head.one2one_cv2 if self._one_to_one else head.cv2
        classes = head.one2one_cv3 if self._one_to_one else head.cv3
        maps: list[Tensor] = []
        for level, feature in enumerate(x):
            maps += [boxes[level](feature), classes[level](feature)]
        return tuple(maps)


def _route(previous: Any, outputs: Sequence[Any], source: int | list[int]) -> Any:
    """Return the outputs that a layer reads: one tensor for one index, a list for several."""
    if isinstance(source, int):
        return outputs[source]
    return [previous if index == -1 else outputs[index] for index in source]


class DflDecode(nn.Module):
    """Raw maps to boxes and scores, with the cells in the order (level, y, x).

    Each side's distance is the expectation over its bins, `sum_i i * softmax(z)_i` (Generalized Focal
    Loss, eq. 6), in cells from the cell's centre; with one bin the map is the distance itself.
    Softmax is written out, because runtimes transpose for a softmax over a middle axis.
    """

    bins: Tensor

    def __init__(self, bins: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer(
            "bins", torch.arange(bins, dtype=torch.float32).reshape(1, 1, bins, 1), persistent=False
        )
        self.strides = tuple(strides)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return `output0`, float32 `[N, 4 + nc, A]`, for the maps of `UltralyticsCore`."""
        boxes, classes = maps[0::2], maps[1::2]
        flat = torch.cat([raw.reshape(raw.shape[0], raw.shape[1], -1) for raw in boxes], 2)
        scores = torch.cat([raw.reshape(raw.shape[0], raw.shape[1], -1) for raw in classes], 2)
        sides = self._distances(flat)
        grids = cell_offsets(boxes, 0.5)
        centres = torch.cat(grids, 1)
        strides = torch.cat(
            [torch.full_like(grid[:1], stride) for grid, stride in zip(grids, self.strides, strict=True)], 1
        )
        low, high = sides[:, 0:2], sides[:, 2:4]
        xy = (centres + (high - low) * 0.5) * strides
        wh = (low + high) * strides
        return torch.cat((xy, wh, scores.sigmoid()), 1)

    def _distances(self, flat: Tensor) -> Tensor:
        """Return left, top, right, bottom in cells, float32 `[N, 4, A]`, for `[N, 4 * bins, A]`."""
        count = self.bins.shape[2]
        if count == 1:
            return flat
        logits = flat.reshape(flat.shape[0], 4, count, -1)
        weights = (logits - logits.amax(2, keepdim=True)).exp()
        return (weights * self.bins).sum(2) / weights.sum(2)


class UltralyticsDetector(Detector):
    """A detection model of ultralytics."""

    def __init__(self, spec: ModelSpec, layers: nn.Sequential) -> None:
        super().__init__()
        head: Any = layers[-1]
        self.spec = spec
        self.core = UltralyticsCore(layers)
        self.decode = DflDecode(head.reg_max, spec.strides)
        self._one_to_one = self.core._one_to_one

    def loss(
        self, raw_maps: Sequence[Tensor], batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Return ultralytics' detection loss: CIoU, distribution focal loss and binary cross-entropy.

        Its gains are ultralytics' defaults. The core may meanwhile be a quantized graph, since nothing
        but the maps is used. One-to-one heads are assigned as ultralytics assigns that branch.
        """
        boxes, classes = list(raw_maps[0::2]), list(raw_maps[1::2])
        predictions = {
            "boxes": torch.cat([raw.flatten(2) for raw in boxes], 2),
            "scores": torch.cat([raw.flatten(2) for raw in classes], 2),
            "feats": boxes,  # of the features the loss reads sizes only
        }
        parts, items = self._criterion(boxes[0])(predictions, batch)
        return parts.sum(), {name: float(value) for name, value in items.items()}

    def _criterion(self, example: Tensor) -> Any:
        import_ultralytics()
        from ultralytics.utils import DEFAULT_CFG
        from ultralytics.utils.loss import v8DetectionLoss

        assert isinstance(self.decode, DflDecode)
        head = SimpleNamespace(
            stride=torch.tensor(self.spec.strides, dtype=torch.float32, device=example.device),
            nc=len(self.spec.names),
            reg_max=self.decode.bins.shape[2],
        )
        model = SimpleNamespace(args=DEFAULT_CFG, model=[head], parameters=lambda: iter((example,)))
        if self._one_to_one:
            return v8DetectionLoss(model, tal_topk=7, tal_topk2=1)
        return v8DetectionLoss(model)


def build_ultralytics(spec: ModelSpec) -> UltralyticsDetector:
    """Build a freshly initialised detector of ultralytics.

    Raises:
        InputError: The config is not one of a detection model that this package can quantize.
    """
    layers, strides = _build_layers(spec.config, len(spec.names))
    if strides != spec.strides:
        raise InputError(f"The model's config gives strides {list(strides)} and not {list(spec.strides)}.")
    return UltralyticsDetector(spec, layers)


def spec_from_config(source: str | Path | Mapping[str, Any], names: Sequence[str] | None = None) -> ModelSpec:
    """Make the spec of an ultralytics architecture.

    Args:
        source: A name with its scale ("yolov8n", "yolo11n"), the path of a model YAML, or its content.
        names: Class names; by default "0", "1", ... for the config's number of classes.

    Raises:
        InputError: There is no such config, or it is not one of a detection model.
    """
    config = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else read_config(source)
    check_config(config)
    if names is None:
        names = [str(i) for i in range(config["nc"])]
    config["nc"] = len(names)
    _, strides = _build_layers(config, len(names))
    return ModelSpec("ultralytics", config, tuple(names), strides)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config with layers, activations or keys that are not those of a detection model.

    Raises:
        InputError: Names the layer or key.
    """
    rows = [row for key in ("backbone", "head") for row in _rows(config, key)]
    for index, (_, _, name, _) in enumerate(rows):
        if name not in LAYERS:
            raise InputError(
                f"Layer {index} of the model's config is a '{name}', which is not a layer of a detection model.",
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
            raise InputError(
                f"A row of '{key}' in the model's config is not [from, repeats, name, arguments]."
            )
    return rows


def _build_layers(config: Mapping[str, Any], classes: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Let ultralytics build the layers; returns them with the strides of the head's levels."""
    check_config(config)
    if config["nc"] != classes:
        raise InputError(f"The model's config has nc={config['nc']} but {classes} class names.")
    import_ultralytics()
    from ultralytics.nn.tasks import DetectionModel

    try:
        model = DetectionModel(copy.deepcopy(dict(config)), ch=3, verbose=False)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(f"ultralytics cannot build the model's config ({error}).") from error
    return model.model, tuple(int(stride) for stride in model.stride.tolist())


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
        hint="Name one with its scale, such as yolov8n, yolo11n or yolo12n, or give the path of a model YAML.",
    )
