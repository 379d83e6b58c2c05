"""The training loop: cosine schedule, EMA, early stopping, a checkpoint after each epoch, and resuming from it."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qyolo_deploy.errors import QyoloError
from qyolo_deploy.recipe import TrainingSection
from qyolo_deploy.training import distributed
from qyolo_deploy.training.ema import Ema
from qyolo_deploy.training.loader import Batch, Loader
from qyolo_deploy.training.losses import Step
from qyolo_deploy.training.state import load_tensors, optimizer_tensors, restore_optimizer, save_tensors

logger = logging.getLogger(__name__)

_EMA_WARMUP_STEPS = 2000
_MAX_SKIPPED_IN_A_ROW = 5
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
    """Length and shape of a run; the fields are those of `TrainingSection`."""

    epochs: int
    warmup_epochs: float
    final_lr: float
    ema_decay: float
    close_mosaic: int = 0
    optimizer: str = "adamw"
    momentum: float = 0.937
    max_grad_norm: float = 10.0
    precision: str = "float32"
    patience: int | None = None

    @classmethod
    def of(cls, section: TrainingSection) -> "Schedule":
        """The schedule of a training section."""
        close_mosaic = section.augment.close_mosaic if section.augment.mosaic else 0
        same = {item.name: getattr(section, item.name) for item in fields(cls) if item.name != "close_mosaic"}
        return cls(close_mosaic=close_mosaic, **same)

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Share of the full learning rate: linear warm-up, then half a cosine down to `final_lr`."""
        total, warmup = self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        return self.cosine(step, max(total, 1)) * min(1.0, (step + 1) / max(warmup, 1.0))

    def cosine(self, done: float, total: float) -> float:
        """The same without warm-up, where `done` of `total` is behind."""
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done / total)) / 2

    def make_optimizer(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """The optimizer over all groups; learning rates are set anew before each step."""
        settings = [
            {"params": group.parameters, "lr": group.lr, "weight_decay": group.weight_decay} for group in groups
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(settings, momentum=self.momentum, nesterov=self.momentum > 0)
        return torch.optim.Adam(settings) if self.optimizer == "adam" else torch.optim.AdamW(settings)


class Hooks:
    """What a kind of training does beside the loop's own work; this one does nothing.

    `progress` is the share of the run that is done, in 0..1.
    """

    def begin(self, progress: float) -> None:
        """Before the first step, also of a resumed run, and before each epoch."""

    def gradients_ready(self, progress: float) -> dict[str, float]:
        """After the backward pass; may change gradients. Returns loss parts to be logged."""
        return {}

    def stepped(self, progress: float, ema: Mapping[str, Tensor]) -> None:
        """After an optimizer step, before the EMA follows it."""

    def tensors(self) -> dict[str, Tensor]:
        """State that is not in the model, for the checkpoint."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the EMA state, on the processor, and one record an epoch; the model holds the raw state."""

    ema: dict[str, Tensor]
    history: tuple[dict[str, Any], ...]


class _Run:
    """The moving parts of one run, saved and restored together."""

    def __init__(
        self, model: nn.Module, groups: Sequence[ParameterGroup], schedule: Schedule, steps: int, hooks: Hooks
    ) -> None:
        self.model, self.hooks, self.schedule, self.steps = model, hooks, schedule, steps
        self.optimizer = schedule.make_optimizer(groups)
        self.device = next(model.parameters()).device
        self.rates = [group.lr for group in groups]
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self.ema = Ema(model, schedule.ema_decay, min(_EMA_WARMUP_STEPS, max(1.0, schedule.epochs * steps / 5)))
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}

    def progress(self, done: int) -> float:
        return done / max(self.schedule.epochs * self.steps, 1)

    def save(self, path: Path, key: str) -> None:
        tensors = {f"raw/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.shadow.items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"hooks/{name}": value for name, value in self.hooks.tensors().items()}
        tensors |= optimizer_tensors(self.optimizer)
        save_tensors(path, tensors, {"key": key, "ema_steps": self.ema.steps, "history": self.history})

    def restore(self, path: Path, key: str) -> None:
        found = load_tensors(path)
        if found is None or found[1].get("key") != key:
            return
        tensors, info = found
        self.model.load_state_dict(_part(tensors, "raw/"))
        for name, value in _part(tensors, "ema/").items():
            self.ema.shadow[name].copy_(value)
        self.ema.steps = info["ema_steps"]
        self.best = _part(tensors, "best/")
        self.hooks.restore(_part(tensors, "hooks/"))
        restore_optimizer(self.optimizer, tensors)
        self.history = info["history"]

    def has_stalled(self) -> bool:
        """Whether the best epoch lies further back than the patience reaches."""
        if self.schedule.patience is None or not self.history:
            return False
        scores = [entry["map50_95"] for entry in self.history]
        return len(scores) - 1 - scores.index(max(scores)) >= self.schedule.patience

    def validate(self, evaluate: Callable[[], float]) -> None:
        """Measures the EMA state, and keeps it if it is the best so far."""
        raw = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema.shadow)
        score = evaluate()
        self.model.load_state_dict(raw)
        if score > max((entry["map50_95"] for entry in self.history[:-1]), default=-1.0):
            self.best = {name: value.clone() for name, value in self.ema.shadow.items()}
        self.history[-1]["map50_95"] = score


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
    hooks: Hooks | None = None,
    evaluate: Callable[[], float] | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Trains, going on from the checkpoint of an interrupted run with the same key.

    Args:
        model: What learns, on the device that it learns on; holds the raw state afterwards.
        step: Loss of a batch, a mean over its images.
        groups: Parameters and learning rates.
        loader: Batches; in a distributed run this process's part of each.
        schedule: Length and shape.
        checkpoint: Where the state is kept after each epoch.
        key: Digest of everything that decides the result; another key starts over.
        set_mode: Puts the model into the mode that it trains in.
        hooks: What else happens in a step.
        evaluate: mAP of the model as it is; needed where the schedule has patience.
        progress: Called after each batch.

    Raises:
        QyoloError: If loss or gradients are not finite in several steps in a row; it names the step.
    """
    run = _Run(model, groups, schedule, len(loader), hooks or Hooks())
    run.restore(checkpoint, key)
    distributed.share_state(model)
    for epoch in range(len(run.history), schedule.epochs):
        if run.has_stalled():
            break
        set_mode()
        if epoch >= schedule.epochs - schedule.close_mosaic:
            loader.close_mosaic()
        run.hooks.begin(epoch / schedule.epochs)
        run.history.append(_epoch(run, step, loader, epoch, progress))
        distributed.mean_buffers(model)
        if schedule.patience is not None and evaluate is not None:
            run.validate(evaluate)
        if distributed.is_first():
            run.save(checkpoint, key)
        distributed.wait_for_all()
    averaged = {name: value.cpu() for name, value in (run.best or run.ema.shadow).items()}
    return Trained(averaged, tuple(run.history))


def _epoch(run: _Run, step: Step, loader: Loader, epoch: int, progress: Progress | None) -> dict[str, Any]:
    start, total, images = time.perf_counter(), 0.0, 0
    parts: dict[str, float] = {}
    skipped: list[int] = []
    for index, batch in enumerate(loader.epoch(epoch)):
        done = epoch * len(loader) + index
        outcome = _step(run, step, batch, done)
        if outcome is None:
            skipped.append(done + 1)
            _give_up_on_row([*(run.history[-1]["skipped_steps"] if run.history else ()), *skipped], epoch + 1)
            continue
        value, items = outcome
        total, images = total + value, images + len(batch["img"])
        parts = {name: parts.get(name, 0.0) + item for name, item in items.items()}
        if progress is not None:
            line = f"epoch {epoch + 1}/{run.schedule.epochs}, loss {total / (index + 1 - len(skipped)):.4f}"
            progress(done + 1, run.schedule.epochs * len(loader), line)
    seconds, steps = time.perf_counter() - start, max(len(loader) - len(skipped), 1)
    return {
        "epoch": epoch + 1,
        "loss": total / steps,
        **{name: value / steps for name, value in parts.items()},
        "lr": run.rates[0] * run.schedule.factor((epoch + 1) * len(loader) - 1, len(loader)),
        "skipped_steps": skipped,
        "seconds": round(seconds, 3),
        "images_per_s": round(images * distributed.shard()[1] / seconds, 2),
    }


def _step(run: _Run, step: Step, batch: Batch, done: int) -> tuple[float, dict[str, float]] | None:
    """One optimizer step; None, and nothing is changed, where loss or gradients are not finite."""
    factor, progress = run.schedule.factor(done, run.steps), run.progress(done)
    batch = {name: value.to(run.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
        group["lr"] = rate * factor
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.schedule.precision == "bfloat16"):
        loss, items = step(batch)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    value = distributed.mean_gradients(run.parameters, loss)
    items |= run.hooks.gradients_ready(progress)
    norm = nn.utils.clip_grad_norm_(run.parameters, run.schedule.max_grad_norm)
    if not math.isfinite(value) or not torch.isfinite(norm):
        logger.warning("step %d: loss %s, gradient norm %s; the step is skipped", done + 1, value, float(norm))
        return None
    run.optimizer.step()
    run.hooks.stepped(run.progress(done + 1), run.ema.shadow)
    run.ema.update()
    return value, items


def _give_up_on_row(skipped: Sequence[int], epoch: int) -> None:
    """One bad batch is left out; several in a row are a run that has diverged."""
    row = skipped[-_MAX_SKIPPED_IN_A_ROW:]
    if len(row) == _MAX_SKIPPED_IN_A_ROW and row[-1] - row[0] == len(row) - 1:
        raise QyoloError(
            f"loss or gradients are not finite in steps {row[0]} to {row[-1]} (epoch {epoch})",
            hint="Lower the learning rate.",
        )
