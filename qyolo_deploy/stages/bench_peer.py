"""The peer of `qyolo bench train`: the step of ultralytics' own int8 training (`yolo train quantize=8`).

Model, fake quantization (through nvidia-modelopt), loss, optimizer, clipping and EMA are ultralytics'; only the data
loading around them is not.
"""

import copy
import importlib
from typing import Any

import torch

from qyolo_deploy.models.base import Detector
from qyolo_deploy.models.ultralytics_env import import_ultralytics
from qyolo_deploy.stages.bench_steps import Turns

_LR, _MOMENTUM, _WEIGHT_DECAY = 0.001, 0.9, 0.0005


def train_peer(detector: Detector, turns: Turns) -> None:
    """Trains ultralytics' copy of a detector of theirs.

    Their float16 and bfloat16 are off, as on every CPU, and an optimizer step follows each batch: where batches are
    smaller than 64 they otherwise add up gradients first.

    Raises:
        ImportError: nvidia-modelopt or something below it is missing.
    """
    import_ultralytics()
    importlib.import_module("modelopt.torch.quantization")  # else they would try to install it
    torch_utils: Any = importlib.import_module("ultralytics.utils.torch_utils")
    trainer = _trainer(_model(detector, turns, torch_utils), torch_utils)
    for batch in turns.epoch(0):
        loss, _ = trainer.model(batch)
        trainer.scaler.scale(loss.sum()).backward()
        trainer.optimizer_step()


def _model(detector: Detector, turns: Turns, torch_utils: Any) -> Any:
    tasks: Any = importlib.import_module("ultralytics.nn.tasks")
    model = tasks.DetectionModel(copy.deepcopy(detector.spec.config), ch=3, verbose=False)
    # Heads of two branches train both there and one here, so ours lacks some tensors.
    model.load_state_dict(detector.core.state_dict(), strict=False)
    model.args = importlib.import_module("ultralytics.cfg").get_cfg()
    return torch_utils.prepare_qat(model.train(), [dict(turns.batch)], lambda batch: batch)


def _trainer(model: Any, torch_utils: Any) -> Any:
    """Their trainer without its constructor, which wants a dataset on disk."""
    kind: Any = importlib.import_module("ultralytics.engine.trainer").BaseTrainer
    trainer = kind.__new__(kind)
    trainer.model, trainer.device = model, torch.device("cpu")
    trainer.optimizer = trainer.build_optimizer(model, "AdamW", _LR, _MOMENTUM, _WEIGHT_DECAY)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainer.ema = torch_utils.ModelEMA(model)
    return trainer
