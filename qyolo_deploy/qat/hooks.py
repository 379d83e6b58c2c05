"""What quantization-aware training does in each step: clamping, staging, watching and taming oscillations."""

from collections.abc import Mapping

from torch import Tensor

from qyolo_deploy.graph.fake_quantize import Quantizer
from qyolo_deploy.graph.features import block_of
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.qat.oscillation import OscillationTracker, dampen, falling, rising
from qyolo_deploy.qat.rounding import LearnedRounding
from qyolo_deploy.qat.traces import Traces
from qyolo_deploy.recipe import TrainSection
from qyolo_deploy.training.loop import Hooks


class QatHooks(Hooks):
    """Oscillation control of a calibrated model.

    Args:
        model: Gets a `tracker`, whose buffers travel with its state until `finish`.
        section: Recipe section train.
        steps: Optimizer steps of the whole run.
    """

    def __init__(self, model: PreparedModel, section: TrainSection, steps: int) -> None:
        self._model, self._section = model, section
        kind = OscillationTracker if section.rounding is None else LearnedRounding
        self.tracker = kind(model, section.oscillation_momentum)
        model.tracker = self.tracker
        self.traces = Traces(model, self.tracker, steps)
        self._late = _behind_backbone(model)

    def begin(self, progress: float) -> None:
        """Takes up frozen and learning weights of a resumed run, and switches quantizers by stage."""
        self.tracker.attach()
        self._stage(progress)

    def gradients_ready(self, progress: float) -> dict[str, float]:
        """Adds the gradients of dampening and of undecided roundings."""
        parts = {}
        dampening, rounding = self._section.dampening, self._section.rounding
        if dampening is not None and (weight := rising(progress, dampening.weight, dampening.start)):
            parts["dampening"] = dampen(self._model, weight)
        if rounding is not None and (weight := rising(progress, rounding.regularizer, rounding.start, rounding.end)):
            assert isinstance(self.tracker, LearnedRounding)
            parts["rounding"] = self.tracker.regularize(weight)
        return parts

    def stepped(self, progress: float, ema: Mapping[str, Tensor]) -> None:
        """Clamps, counts, freezes or catches, and records."""
        self._model.clamp_()
        self.tracker.update()
        if (freezing := self._section.freezing) is not None:
            threshold = falling(progress, freezing.first, freezing.last, freezing.start)
            if threshold is not None:
                self.tracker.freeze(threshold)
        self._round(progress)
        self.traces.record(progress, ema)
        self._stage(progress)

    def _round(self, progress: float) -> None:
        """Oscillating weights begin to learn their rounding, until all of it is settled."""
        rounding = self._section.rounding
        if rounding is None or progress < rounding.start:
            return
        assert isinstance(self.tracker, LearnedRounding)
        if progress < rounding.end:
            self.tracker.catch(rounding.frequency)
        else:
            self.tracker.settle()

    def _stage(self, progress: float) -> None:
        """Early on only the backbone is quantized, so that what follows learns from settled features."""
        enabled = progress >= self._section.backbone_first
        for quantizer in self._late:
            quantizer.enabled = enabled

    def tensors(self) -> dict[str, Tensor]:
        """The traces; the tracker is part of the model."""
        return self.traces.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the traces back."""
        self.traces.restore(tensors)

    def finish(self) -> None:
        """Writes frozen integers into the weights and takes the tracker off the model."""
        self.tracker.bake()
        self._model.tracker = None
        for quantizer in self._late:
            quantizer.enabled = True


def _behind_backbone(model: PreparedModel) -> list[Quantizer]:
    """Quantizers of weights and activations of neck and head, as the architecture's YAML divides them."""
    backbone = {f"model.{index}" for index in range(len(model.spec.config["backbone"]))} | {"images"}
    late = [quantizer for group, quantizer in model.quantizers().items() if block_of(group) not in backbone]
    for name, conv in model.convs().items():
        if conv.quantizer is not None and block_of(name) not in backbone:
            late.append(conv.quantizer)
    return late
