"""The training loop: AdamW with cosine decay, EMA, a checkpoint after each epoch, and resuming from it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qyolo_deploy.errors import QyoloError
from qyolo_deploy.recipe import TrainingSection
from qyolo_deploy.training.ema import Ema
from qyolo_deploy.training.loader import Loader
from qyolo_deploy.training.losses import Step
from qyolo_deploy.training.state import load_tensors, optimizer_tensors, restore_optimizer, save_tensors

MAX_GRAD_NORM = 10.0
_EMA_WARMUP_STEPS = 2000
Progress = Callable[[int, int, str], None]
"""Called with batches done, batches in total and a line about the state."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[nn.Parameter]
    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Length and shape of a run."""

    epochs: int
    warmup_epochs: float
    final_lr: float
    ema_decay: float
    close_mosaic: int = 0

    @classmethod
    def of(cls, section: TrainingSection) -> "Schedule":
        """The schedule of a training section."""
        close_mosaic = section.augment.close_mosaic if section.augment.mosaic else 0
        return cls(section.epochs, section.warmup_epochs, section.final_lr, section.ema_decay, close_mosaic)

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Share of the full learning rate: linear warm-up, then half a cosine down to `final_lr`."""
        total, warmup = self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        cosine = self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * step / max(total, 1))) / 2
        return cosine * min(1.0, (step + 1) / max(warmup, 1.0))


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the EMA state and one record an epoch; the model itself holds the raw state."""

    ema: dict[str, Tensor]
    history: tuple[dict[str, Any], ...]


class _Run:
    """The moving parts of one run, saved and restored together."""

    def __init__(self, model: nn.Module, groups: Sequence[ParameterGroup], schedule: Schedule, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(
            [{"params": group.parameters, "lr": group.lr, "weight_decay": group.weight_decay} for group in groups]
        )
        self.rates = [group.lr for group in groups]
        self.ema = Ema(model, schedule.ema_decay, min(_EMA_WARMUP_STEPS, max(1.0, schedule.epochs * steps / 5)))
        self.history: list[dict[str, Any]] = []

    def save(self, path: Path, key: str) -> None:
        tensors = {f"raw/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.shadow.items()}
        tensors |= optimizer_tensors(self.optimizer)
        save_tensors(path, tensors, {"key": key, "ema_steps": self.ema.steps, "history": self.history})

    def restore(self, path: Path, key: str) -> None:
        found = load_tensors(path)
        if found is None or found[1].get("key") != key:
            return
        tensors, info = found
        self.model.load_state_dict(_part(tensors, "raw/"))
        self.ema.shadow = _part(tensors, "ema/")
        self.ema.steps = info["ema_steps"]
        restore_optimizer(self.optimizer, tensors)
        self.history = info["history"]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def fit(
    model: nn.Module,
    step: Step,
    groups: Sequence[ParameterGroup],
    loader: Loader,
    schedule: Schedule,
    *,
    checkpoint: Path,
    key: str,
    set_mode: Callable[[], object],
    after_step: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Trains, going on from the checkpoint of an interrupted run with the same key.

    Args:
        model: What learns; holds the raw state afterwards.
        step: Loss of a batch.
        groups: Parameters and learning rates.
        loader: Batches.
        schedule: Length and shape.
        checkpoint: Where the state is kept after each epoch.
        key: Digest of everything that decides the result; another key starts over.
        set_mode: Puts the model into the mode that it trains in.
        after_step: Called after each optimizer step, to bring parameters back into their ranges.
        progress: Called after each batch.

    Raises:
        QyoloError: If the loss is not finite.
    """
    run = _Run(model, groups, schedule, len(loader))
    run.restore(checkpoint, key)
    set_mode()
    for epoch in range(len(run.history), schedule.epochs):
        if epoch >= schedule.epochs - schedule.close_mosaic:
            loader.close_mosaic()
        run.history.append(_epoch(run, step, loader, schedule, epoch, after_step, progress))
        run.save(checkpoint, key)
    return Trained(run.ema.shadow, tuple(run.history))


def _epoch(
    run: _Run,
    step: Step,
    loader: Loader,
    schedule: Schedule,
    epoch: int,
    after_step: Callable[[], None] | None,
    progress: Progress | None,
) -> dict[str, Any]:
    start, total, images = time.perf_counter(), 0.0, 0
    parts: dict[str, float] = {}
    for index, batch in enumerate(loader.epoch(epoch)):
        done = epoch * len(loader) + index
        factor = schedule.factor(done, len(loader))
        for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
            group["lr"] = rate * factor
        loss, items = step(batch)
        if not math.isfinite(value := loss.item()):
            raise QyoloError(f"the loss is {value} in epoch {epoch + 1}", hint="Lower the learning rate.")
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for g in run.optimizer.param_groups for p in g["params"]], MAX_GRAD_NORM)
        run.optimizer.step()
        if after_step is not None:
            after_step()
        run.ema.update()
        total, images = total + value, images + len(batch["img"])
        parts = {name: parts.get(name, 0.0) + value for name, value in items.items()}
        if progress is not None:
            line = f"epoch {epoch + 1}/{schedule.epochs}, loss {total / (index + 1):.4f}"
            progress(done + 1, schedule.epochs * len(loader), line)
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch + 1,
        "loss": total / len(loader),
        **{name: value / len(loader) for name, value in parts.items()},
        "lr": run.rates[0] * schedule.factor((epoch + 1) * len(loader) - 1, len(loader)),
        "seconds": round(seconds, 3),
        "images_per_s": round(images / seconds, 2),
    }
