"""Where training computes: the processor or a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qyolo_deploy.errors import InputError

CPU = torch.device("cpu")


def training_device(name: str) -> torch.device:
    """The device of a name; of several processes on one machine each gets a GPU of its own.

    Args:
        name: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:<index>".

    Raises:
        InputError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if device.index >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs",
            hint="--device cpu trains without one.",
        )
    torch.cuda.set_device(device)  # where collective operations of several processes happen
    return device


@contextmanager
def placed(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Has modules on a device and brings them back to the processor, where everything but training happens."""
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to("cpu")
