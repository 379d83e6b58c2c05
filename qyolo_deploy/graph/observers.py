"""Start values for scales and offsets: the range with the least squared rounding error."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qyolo_deploy.graph.fake_quantize import MIN_SCALE, Quantizer
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.quant.spec import QuantSpec

CANDIDATES = 100
_SAMPLES_PER_CALL = 8192


@dataclass
class _Sample:
    """Extremes of all values of a tensor, and some of the values."""

    low: float = 0.0
    high: float = 0.0
    values: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        flat = x.detach().flatten()
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
        picked = torch.randint(len(flat), (_SAMPLES_PER_CALL,), generator=generator)
        self.values.append(flat[picked])


def search_range(values: Tensor, low: float, high: float, spec: QuantSpec) -> tuple[float, float]:
    """Finds the clipping range with the least squared error among 100 shrunk ones.

    Args:
        values: float32 `[n]`, a sample.
        low: Smallest value of all, at most 0.
        high: Largest value of all, at least 0.
        spec: The grid; signed grids are symmetric.

    Returns:
        Scale and offset (0 for signed grids).
    """
    limit = max(-low, high, MIN_SCALE)
    best = (float("inf"), 1.0, 0.0)
    for step in range(1, CANDIDATES + 1):
        bound = limit * step / CANDIDATES
        scale, offset = _grid(max(low, -bound), min(high, bound), bound, spec)
        zero_point = min(max(round(-offset / scale), spec.qmin), spec.qmax)
        integers = torch.clamp(torch.round(values / scale), spec.qmin - zero_point, spec.qmax - zero_point)
        error = float(torch.square(integers * scale - values).mean())
        best = min(best, (error, scale, offset))
    return best[1], best[2]


def _grid(low: float, high: float, bound: float, spec: QuantSpec) -> tuple[float, float]:
    if spec.signed:
        return bound / spec.qmax, 0.0
    return max((high - low) / spec.qmax, MIN_SCALE), low


def calibrate(model: PreparedModel, batches: Iterable[Tensor], progress: Callable[[], None] | None = None) -> None:
    """Sets every scale and offset: weights from themselves, activations from what the float network computes.

    Args:
        model: From `prepare`.
        batches: float32 `[N, 3, H, W]` in 0..1, from the training split.
        progress: Called after each batch.
    """
    model.eval()
    samples = _observe(model, batches, progress)
    for group, quantizer in model.quantizers().items():
        sample = samples[group]
        _set(quantizer, *search_range(torch.cat(sample.values), sample.low, sample.high, quantizer.spec))
    for conv in model.convs().values():
        if conv.quantizer is not None:
            _calibrate_weight(conv.weight.detach(), conv.quantizer)


@torch.no_grad()
def _observe(
    model: PreparedModel, batches: Iterable[Tensor], progress: Callable[[], None] | None
) -> dict[str, _Sample]:
    samples = {group: _Sample() for group in model.quantizers()}
    generator = torch.Generator().manual_seed(0)

    def hook_of(group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: samples[group].add(inputs[0], generator)

    handles = [quantizer.register_forward_pre_hook(hook_of(group)) for group, quantizer in model.quantizers().items()]
    model.set_activations(False)
    model.set_weights(False)
    try:
        for images in batches:
            model(images)
            if progress is not None:
                progress()
    finally:
        for handle in handles:
            handle.remove()
        model.set_activations(True)
        model.set_weights(True)
    return samples


def _calibrate_weight(weight: Tensor, quantizer: Quantizer) -> None:
    if quantizer.spec.granularity == "per_tensor":
        limit = float(weight.abs().max())
        _set(quantizer, *search_range(weight.flatten(), -limit, limit, quantizer.spec))
        return
    limits = weight.flatten(1).abs().amax(1).tolist()
    rows = zip(weight.flatten(1), limits, strict=True)
    scales = [search_range(row, -limit, limit, quantizer.spec)[0] for row, limit in rows]
    with torch.no_grad():
        quantizer.scale.copy_(torch.tensor(scales))


def _set(quantizer: Quantizer, scale: float, offset: float) -> None:
    with torch.no_grad():
        quantizer.scale.fill_(scale)
        quantizer.offset.fill_(offset)
