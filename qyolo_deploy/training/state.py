"""Resumable training state as safetensors: tensors by name and one JSON value, no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim import Optimizer

from qyolo_deploy.atomic import write_atomic


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes tensors and plain data atomically."""
    data = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomic(path, save(data, {"qyolo": json.dumps(info, sort_keys=True)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Reads what `save_tensors` wrote; None where there is no such file or it is not readable."""
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["qyolo"])
            return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's moments as named tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer/{index}/{name}": torch.as_tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts the moments back; learning rates are the loop's business."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
