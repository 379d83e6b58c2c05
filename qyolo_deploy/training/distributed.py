"""Data-parallel training in the processes that torchrun started: who is who, and what they have in common."""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The first process may generate scenes or train in float for hours before the others are needed.
_PATIENCE = timedelta(days=7)


def shard() -> tuple[int, int]:
    """Number of this process and count of all, as torchrun tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return shard()[0] == 0


def connect() -> bool:
    """Joins the other processes; False where there are none."""
    if shard()[1] == 1:
        return False
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    return True


def tell(message: Any) -> Any:
    """Gives what the first process says to all; the others' argument is ignored."""
    if not connect():
        return message
    box = [message if is_first() else None]
    dist.broadcast_object_list(box)
    return box[0]


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if connect():
        dist.barrier()


def mean_gradients(parameters: Iterable[nn.Parameter], loss: Tensor) -> float:
    """Replaces gradients by their mean over all processes, and returns the mean loss.

    With equal shares of each batch, and losses that are means over images, these are the gradients of one process
    with the whole batch.
    """
    if shard()[1] == 1:
        return float(loss.detach())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.detach().reshape(1)])
    dist.all_reduce(flat)
    flat /= shard()[1]
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view(gradient.shape))
        start += gradient.numel()
    return float(flat[-1])


def total(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes; gradients do not pass."""
    if shard()[1] == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def share_state(model: nn.Module) -> None:
    """Gives all processes the first one's parameters and buffers."""
    if connect():
        for value in model.state_dict().values():
            if value.is_floating_point():
                dist.broadcast(value, 0)


def mean_buffers(model: nn.Module) -> None:
    """Replaces floating-point buffers, such as running statistics, by their mean over all processes."""
    if shard()[1] == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= shard()[1]
