"""Find the builder of an architecture, build it and fill it with weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import Detector, ModelSpec
from qyolo_deploy.models.checkpoint import read_checkpoint
from qyolo_deploy.models.ultralytics import build_ultralytics, spec_from_config
from qyolo_deploy.models.ultralytics_config import read_config
from qyolo_deploy.models.yolov5 import build_yolov5, spec_from_yolov5_config

BUILDERS: Mapping[str, Callable[[ModelSpec], Detector]] = {
    "yolov5": build_yolov5,
    "ultralytics": build_ultralytics,
}


_ACTIVATIONS = {"hardswish": "nn.Hardswish()", "relu": "nn.ReLU()"}


def load_detector(weights: Path | None, architecture: str | None, names: Sequence[str] | None, seed: int) -> Detector:
    """Build a detector from a checkpoint, an architecture, or an architecture with a checkpoint's weights.

    Args:
        weights: A checkpoint, or None for random weights.
        architecture: A name such as "yolo11n" or the path of a model YAML; None takes the checkpoint's.
        names: Class names; None keeps the checkpoint's, or numbers the architecture's.
        seed: Seeds what is freshly initialised.

    Returns:
        The detector in float32. Its `not_taken` names the tensors of the head that the checkpoint could
        not fill because the number of classes or the head differs.

    Raises:
        InputError: Neither is given, one is not usable, or they do not fit each other.
    """
    if weights is None and architecture is None:
        raise InputError("A model needs 'weights', an 'architecture', or both.")
    with torch.random.fork_rng(devices=[]):
        if weights is None:
            assert architecture is not None
            return _build_seeded(_architecture_spec(architecture, names), seed)
        checkpoint = read_checkpoint(weights)
        names = checkpoint.spec.names if names is None else names
        try:
            if architecture is None:
                spec = with_names(checkpoint.spec, names)
            else:
                spec = _architecture_spec(architecture, names)
            detector = _build_seeded(spec, seed)
            same = checkpoint.spec.config == spec.config
            detector.not_taken = load_state(detector, checkpoint.state, new_head=not same)
        except InputError as error:
            raise InputError(f"The checkpoint {weights} cannot be used: {error}", error.hint) from error
    return detector


def _build_seeded(spec: ModelSpec, seed: int) -> Detector:
    torch.manual_seed(seed)
    return build_detector(spec)


def build_detector(spec: ModelSpec) -> Detector:
    """Build a freshly initialised detector.

    Raises:
        InputError: The family is unknown or its builder refuses the config.
    """
    if spec.family == "yolov7":
        raise InputError("YOLOv7 is not supported yet.", hint="Use YOLOv5 or a detection model of ultralytics.")
    builder = BUILDERS.get(spec.family)
    if builder is None:
        raise InputError(f"The model family '{spec.family}' is not one of {', '.join(BUILDERS)}.")
    return builder(spec)


def load_state(detector: Detector, state: Mapping[str, Tensor], new_head: bool = False) -> tuple[str, ...]:
    """Fill a detector's core with tensors by name.

    Args:
        detector: What is filled.
        state: Tensors by official name.
        new_head: Whether tensors of the head (the last layer) may be missing or of another shape.

    Returns:
        The names of the head's tensors that kept their initial values.

    Raises:
        InputError: A tensor is missing, surplus or of another shape, the head excepted where allowed.
    """
    own = detector.core.state_dict()
    head = ".".join(next(reversed(own)).split(".")[:2]) + "."  # "model.24."
    taken, skipped = {}, []
    for name, tensor in own.items():
        given = state.get(name)
        if given is not None and given.shape == tensor.shape:
            taken[name] = given
        elif given is None and name.endswith(".num_batches_tracked"):
            taken[name] = tensor
        elif new_head and name.startswith(head):
            skipped.append(name)
        else:
            found = "is missing" if given is None else f"has the shape {list(given.shape)}"
            raise InputError(
                f"The weights do not fit the architecture: '{name}' {found}, expected {list(tensor.shape)}."
            )
    surplus = [name for name in state if name not in own and not (new_head and name.startswith(head))]
    if surplus:
        raise InputError(
            f"The weights do not fit the architecture: {len(surplus)} tensors ('{surplus[0]}') are too many."
        )
    detector.core.load_state_dict(taken, strict=False)
    return tuple(skipped)


def detector_of(architecture: Mapping[str, Any]) -> Detector:
    """A detector of the architecture that a `QuantizedModel` records; its weights are of no use."""
    with torch.random.fork_rng(devices=[]):
        return _build_seeded(ModelSpec.from_json(architecture), 0)


def with_activation(detector: Detector, activation: str) -> Detector:
    """A detector of the same weights in which SiLU is replaced.

    Args:
        detector: Left as it is.
        activation: `hardswish` or `relu`.
    """
    spec = detector.spec
    config = {**copy.deepcopy(spec.config), "activation": _ACTIVATIONS[activation]}
    with torch.random.fork_rng(devices=[]):
        changed = _build_seeded(ModelSpec(spec.family, config, spec.names, spec.strides), 0)
    load_state(changed, detector.core.state_dict())
    return changed


def with_names(spec: ModelSpec, names: Sequence[str]) -> ModelSpec:
    """Return the same architecture for other classes."""
    return ModelSpec(spec.family, {**copy.deepcopy(spec.config), "nc": len(names)}, tuple(names), spec.strides)


def _architecture_spec(architecture: str, names: Sequence[str] | None) -> ModelSpec:
    if architecture.startswith("yolov7"):
        raise InputError("YOLOv7 is not supported yet.", hint="Use YOLOv5 or a detection model of ultralytics.")
    config = read_config(architecture)
    if "anchors" in config:
        return spec_from_yolov5_config(config, names)
    return spec_from_config(config, names)
