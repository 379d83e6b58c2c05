"""The trainings that `qyolo bench train` measures, each in the process that runs it."""

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qyolo_deploy.graph.observers import calibrate
from qyolo_deploy.models.base import Detector
from qyolo_deploy.models.registry import load_detector
from qyolo_deploy.qat import train, train_float
from qyolo_deploy.qat.hooks import QatHooks
from qyolo_deploy.qat.norms import use_batch_statistics
from qyolo_deploy.recipe import SYNTHETIC, LossSection, Recipe
from qyolo_deploy.stages.bench_trainee import FLOAT, QAT, BenchSettings
from qyolo_deploy.training.loader import Batch, Loader
from qyolo_deploy.training.loop import Schedule, Trained, fit
from qyolo_deploy.training.losses import make_step

_WEIGHTS = (".pt", ".safetensors")
_OBJECTS = 8  # in each image
_CALIBRATION_IMAGES = 2  # steps take the same time whatever the scales are


class Turns(Loader):
    """Hands out the same batch again and again, for as many steps as the other end of a pipe asks for.

    Sends facts before the first step, then the seconds of each turn. They last from handing out a batch until the
    next one is wanted, which is the whole of a step in `fit`.

    Args:
        pipe: Gives numbers of steps; 0 ends the training.
        batch: Images and labels.
        total: Steps in all.
        facts: What else the other end should know.
    """

    def __init__(self, pipe: Connection, batch: Batch, total: int, facts: dict[str, Any]) -> None:
        self.batch, self.memory_peak_bytes = batch, 0
        self._pipe, self._total, self._facts = pipe, total, facts

    def __len__(self) -> int:
        """Steps in all."""
        return self._total

    def close_mosaic(self) -> None:
        """There is none."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batch, for all the steps of the training."""
        self._pipe.send({**self._facts, "memory_before_bytes": _peak_bytes()})
        while steps := self._pipe.recv():
            start = time.perf_counter()
            for _ in range(steps):
                yield self.batch
            self._pipe.send(time.perf_counter() - start)
        self.memory_peak_bytes = _peak_bytes()


def run(kind: str, settings: BenchSettings, pipe: Connection) -> dict[str, Any]:
    """Trains as the other end of the pipe asks for it, and returns what it should know at the end.

    Raises:
        QyoloError: The model is not usable.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    weights = Path(settings.model) if settings.model.endswith(_WEIGHTS) else None
    detector = load_detector(weights, settings.model if weights is None else None, None, settings.seed)
    batch = random_batch(settings, len(detector.spec.names))
    settle(detector.core, batch["img"])
    facts = {"family": detector.spec.family, "torch": torch.__version__, "threads": torch.get_num_threads()}
    turns = Turns(pipe, batch, settings.total_steps, facts)
    skipped = 0
    if kind in (FLOAT, QAT):
        trained = (_train_float if kind == FLOAT else _train_qat)(detector, _recipe(settings), turns)
        skipped = len(trained.history[0]["skipped_steps"])
    else:
        from qyolo_deploy.stages.bench_peer import train_peer

        train_peer(detector, turns)
    return {"memory_peak_bytes": turns.memory_peak_bytes, "skipped_steps": skipped}


def random_batch(settings: BenchSettings, classes: int) -> Batch:
    """Noise with boxes on it; the same for the same seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    images, count = settings.batch, settings.batch * _OBJECTS
    sizes = torch.rand(count, 2, generator=generator) * 0.3 + 0.1
    centres = torch.rand(count, 2, generator=generator) * 0.6 + 0.2
    return {
        "img": torch.rand(images, 3, settings.imgsz, settings.imgsz, generator=generator),
        "cls": torch.randint(classes, (count, 1), generator=generator).float(),
        "bboxes": torch.cat([centres, sizes], 1),
        "batch_idx": torch.arange(images).repeat_interleave(_OBJECTS).float(),
        "labeled": torch.ones(images, dtype=torch.bool),
    }


@torch.no_grad()
def settle(core: nn.Module, images: Tensor) -> None:
    """Gives batch normalisation of random weights the statistics of some images.

    With those of a fresh network activations vanish on the way where running statistics are used, and arithmetic with
    denormal numbers is slow.
    """
    norms = [module for module in core.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    core.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _recipe(settings: BenchSettings) -> Recipe:
    """All defaults of a recipe but these: one epoch, the bits, and labels alone, as float training has it."""
    loss = LossSection(labels=1.0, logits=0.0, detections=0.0)
    return Recipe.model_validate(
        {
            "name": "bench",
            "model": {"architecture": settings.model, "imgsz": settings.imgsz},
            "data": {"source": SYNTHETIC},
            "quantization": {
                "weights": {"bits": settings.weight_bits},
                "activations": {"bits": settings.activation_bits},
            },
            "float": {"epochs": 1, "batch": settings.batch},
            "train": {"epochs": 1, "batch": settings.batch, "loss": loss},
        }
    )


def _train_float(detector: Detector, recipe: Recipe, turns: Turns) -> Trained:
    core, section = detector.core, recipe.float
    with tempfile.TemporaryDirectory() as folder:
        return fit(
            core,
            make_step(core, detector, recipe.train.loss),
            train_float.parameter_groups(core, section.lr, section.weight_decay),
            turns,
            Schedule.of(section),
            checkpoint=Path(folder) / "checkpoint.safetensors",
            key="bench",
            set_mode=core.train,
        )


def _train_qat(detector: Detector, recipe: Recipe, turns: Turns) -> Trained:
    section = recipe.train
    model = train.student(detector, recipe)
    calibrate(model, [turns.batch["img"][:_CALIBRATION_IMAGES]], observer=recipe.quantization.observer)

    def set_mode() -> None:
        model.eval()
        use_batch_statistics(model, None)

    with tempfile.TemporaryDirectory() as folder:
        return fit(
            model,
            make_step(model, detector, section.loss),
            train.parameter_groups(model, recipe),
            turns,
            Schedule.of(section),
            checkpoint=Path(folder) / "checkpoint.safetensors",
            key="bench",
            set_mode=set_mode,
            hooks=QatHooks(model, section, len(turns)),
        )


def _peak_bytes() -> int:
    """Most memory that this process has held at once (resident); a child of a small process starts small."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
