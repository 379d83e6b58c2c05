"""Checkpoints in and out: official .pt files read as data, our own safetensors written reproducibly."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import ModelSpec
from qyolo_deploy.models.restricted_pickle import ModuleStub, load_stubs

_METADATA_KEY = "qyolo"
_KIND = "float_checkpoint"
_MAX_MODULES = 20_000
_YOLOV5 = ("models.yolo.DetectionModel", "models.yolo.Model")
_ULTRALYTICS = ("ultralytics.nn.tasks.DetectionModel", "ultralytics.nn.tasks.YOLOv10DetectionModel")


@dataclass(frozen=True)
class Checkpoint:
    """A float model as data.

    Attributes:
        spec: The architecture, its classes and strides.
        state: Tensors by official name, float32 (counters int64), without what the spec already tells.
        sha256: Digest of the file.
    """

    spec: ModelSpec
    state: dict[str, Tensor]
    sha256: str


def read_checkpoint(path: Path) -> Checkpoint:
    """Read an official YOLOv5 or ultralytics `.pt`, or a `.safetensors` of `write_float_checkpoint`.

    Nothing that the file names is imported or run. Of a training checkpoint the EMA weights are taken.

    Raises:
        InputError: The file is missing, damaged, hostile or of an architecture that is not supported.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"The checkpoint {path} does not exist.") from error
    except OSError as error:
        raise InputError(f"The checkpoint {path} cannot be read ({error.strerror}).") from error
    if path.suffix == ".safetensors":
        spec, state = _read_safetensors(path, data)
    else:
        spec, state = _read_pickle(path, data)
    return Checkpoint(spec, state, hashlib.sha256(data).hexdigest())


def write_float_checkpoint(
    path: Path, spec: ModelSpec, state: Mapping[str, Tensor], dtype: Literal["float16", "float32"] = "float32"
) -> None:
    """Write a float model as safetensors; the same content gives the same bytes.

    The file appears under its name only when it is complete.

    Raises:
        InputError: A value does not fit the type, or the file cannot be written.
    """
    kind = {"float16": torch.float16, "float32": torch.float32}[dtype]
    tensors = {}
    for name, tensor in state.items():
        stored = tensor.detach().cpu().to(kind if tensor.is_floating_point() else tensor.dtype)
        if not torch.isfinite(stored).all():
            raise InputError(f"The tensor {name} has values that {dtype} cannot hold.")
        tensors[name] = stored.clone(memory_format=torch.contiguous_format)
    header = json.dumps({"kind": _KIND, "spec": spec.to_json()}, sort_keys=True, separators=(",", ":"))
    data = safetensors.torch.save(tensors, metadata={_METADATA_KEY: header})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"The checkpoint {path} cannot be written ({error.strerror}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read_safetensors(path: Path, data: bytes) -> tuple[ModelSpec, dict[str, Tensor]]:
    try:
        state = safetensors.torch.load(data)
        # The format: length of the JSON header as 8 bytes little-endian, then the header.
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        content = json.loads(metadata.get(_METADATA_KEY, "null"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(f"The checkpoint {path} is truncated or not a safetensors file.") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise InputError(f"The safetensors file {path} does not say in its metadata that it is a {_KIND} of qyolo.")
    try:
        spec = ModelSpec.from_json(content.get("spec", {}))
    except InputError as error:
        raise InputError(f"The checkpoint {path} cannot be used: {error}", error.hint) from error
    return spec, {name: _plain(tensor, name, path) for name, tensor in state.items()}


def _read_pickle(path: Path, data: bytes) -> tuple[ModelSpec, dict[str, Tensor]]:
    content = load_stubs(data, str(path))
    model = content
    if isinstance(content, dict):
        model = content.get("ema") if content.get("ema") is not None else content.get("model")
    if not isinstance(model, ModuleStub) or model.path not in (*_YOLOV5, *_ULTRALYTICS):
        raise InputError(
            f"The checkpoint {path} holds no YOLO detection model under the key 'ema' or 'model'.",
            hint="Files with a state dict alone do not tell their architecture.",
        )
    family = "yolov5" if model.path in _YOLOV5 else "ultralytics"
    modules = _modules(model, path)
    state = _state(modules, path)
    spec = _spec(family, model, modules, path)
    if family == "yolov5":
        spec, state = _take_anchors(spec, state, path)
    else:
        state = _drop_one_to_many(state)
    return spec, state


def _modules(model: ModuleStub, path: Path) -> dict[str, ModuleStub]:
    """Return every module by its dotted prefix ("" for the model), in the order of registration."""
    found: dict[str, ModuleStub] = {}
    pending = [("", model)]
    while pending:
        prefix, module = pending.pop()
        found[prefix] = module
        children = module.state.get("_modules", {})
        if len(found) > _MAX_MODULES or not isinstance(children, dict):
            raise InputError(f"The checkpoint {path} is not laid out like a model (at '{prefix[:60]}').")
        for name, child in reversed(children.items()):
            if child is not None and not isinstance(child, ModuleStub):
                raise InputError(f"The checkpoint {path} has at '{prefix}{name}' something that is not a module.")
            if child is not None:
                pending.append((f"{prefix}{name}.", child))
    return found


def _state(modules: Mapping[str, ModuleStub], path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        transient = module.state.get("_non_persistent_buffers_set")
        skipped = transient if isinstance(transient, set) else set()
        for group in ("_parameters", "_buffers"):
            tensors = module.state.get(group, {})
            if not isinstance(tensors, dict):
                raise InputError(f"The checkpoint {path} is not laid out like a model ({group} at '{prefix}').")
            for name, tensor in tensors.items():
                if tensor is None or name in skipped:
                    continue
                if not isinstance(tensor, Tensor):
                    raise InputError(f"The checkpoint {path} has at '{prefix}{name}' something that is not a tensor.")
                state[f"{prefix}{name}"] = _plain(tensor, f"{prefix}{name}", path)
    return state


def _plain(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Return an own float32 (or int64) copy of a tensor, after checks against traps and broken training."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"The checkpoint {path} has a tensor '{name}' that is not stored in full.")
    if not tensor.is_floating_point():
        return tensor.detach().to(torch.int64, copy=True)
    plain = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not torch.isfinite(plain).all():
        raise InputError(f"The checkpoint {path} has values in '{name}' that are not finite numbers.")
    return plain


def _spec(family: str, model: ModuleStub, modules: Mapping[str, ModuleStub], path: Path) -> ModelSpec:
    config, stride = model.state.get("yaml"), model.state.get("stride")
    if not isinstance(config, dict) or not isinstance(stride, Tensor) or not 0 < stride.numel() < 10:
        raise InputError(f"The checkpoint {path} does not carry its model's yaml and strides.")
    strides = _plain(stride, "stride", path).flatten().tolist()
    config = {key: value for key, value in config.items() if key != "yaml_file"}
    activation = _activation(modules, path)
    if activation is not None:
        config.setdefault("activation", activation)
    try:
        config = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The checkpoint {path} has a model yaml that is not plain data.") from error
    names = _names(model.state.get("names"), path)
    if config.get("nc") != len(names):
        raise InputError(f"The checkpoint {path} has nc={config.get('nc')} but {len(names)} class names.")
    return ModelSpec(family, config, names, tuple(int(stride) for stride in strides))


def _names(names: Any, path: Path) -> tuple[str, ...]:
    """Return class names from the list or the {index: name} dict that checkpoints carry."""
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, int)) for name in names):
        raise InputError(f"The checkpoint {path} does not carry its class names.")
    return tuple(str(name) for name in names)


def _activation(modules: Mapping[str, ModuleStub], path: Path) -> str | None:
    """Return what stands behind the convolutions where it is not the SiLU of a YAML that names nothing."""
    kinds = set()
    for prefix, module in modules.items():
        parent = modules.get(prefix[: -len("act.")]) if prefix.endswith(".act.") else None
        if parent is not None and parent.path.endswith(".Conv"):
            slope = module.state.get("negative_slope", "")
            kinds.add(f"nn.{module.path.rpartition('.')[2]}({slope})")
    kinds -= {"nn.Identity()"}
    if len(kinds) > 1:
        raise InputError(f"The checkpoint {path} mixes the activations {', '.join(sorted(kinds))}.")
    kind = kinds.pop() if kinds else None
    return None if kind == "nn.SiLU()" else kind


def _take_anchors(spec: ModelSpec, state: dict[str, Tensor], path: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Move the anchors, which training may have changed, from the state into the config, in pixels."""
    found = [name for name in state if name.endswith(".anchors")]
    if len(found) != 1 or state[found[0]].dim() != 3 or len(state[found[0]]) != len(spec.strides):
        raise InputError(f"The checkpoint {path} has no anchors for each of its {len(spec.strides)} head levels.")
    # The head keeps them in cells of its level.
    pixels = state[found[0]].double() * torch.tensor(spec.strides).reshape(-1, 1, 1)
    config = {**spec.config, "anchors": pixels.flatten(1).tolist()}
    rest = {name: tensor for name, tensor in state.items() if not name.endswith((".anchors", ".anchor_grid"))}
    return ModelSpec(spec.family, config, spec.names, spec.strides), rest


def _drop_one_to_many(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the head branch that end-to-end models use in training only."""
    heads = {name.partition("one2one_")[0] for name in state if "one2one_" in name}
    surplus = tuple(head + branch for head in heads for branch in ("cv2.", "cv3."))
    return {name: tensor for name, tensor in state.items() if not name.startswith(surplus)}
