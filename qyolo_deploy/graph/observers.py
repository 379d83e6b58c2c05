"""Start values for scales and offsets: the range with the least squared rounding error."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qyolo_deploy.graph.fake_quantize import MIN_SCALE, Quantizer, round_to_grid
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.quant.spec import QuantSpec

CANDIDATES = 100
OUTPUT_SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)
_SAMPLES_PER_CALL = 4096


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


def search_range(
    values: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, seen_as: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Finds the clipping ranges with the least squared error among 100 shrunk ones.

    Signed grids shrink as a whole, unsigned ones first at the low end, then at the high end.

    Args:
        values: float32 `[rows, n]`, a sample of each row.
        low: float32 `[rows]`, smallest value of all, at most 0.
        high: float32 `[rows]`, largest value of all, at least 0.
        spec: The grid; signed grids are symmetric.
        seen_as: What the only reader makes of the values; the error is then that of its result.

    Returns:
        Scale and offset (0 for signed grids), float32 `[rows]` each.
    """
    wanted = values if seen_as is None else seen_as(values)

    def error_of(low: Tensor, high: Tensor) -> Tensor:
        rounded = round_to_grid(values, *_grid(low, high, spec), spec)
        return torch.square((rounded if seen_as is None else seen_as(rounded)) - wanted).mean(1)

    if spec.signed:
        limit = torch.maximum(-low, high)
        share = _best_share(lambda share: error_of(-limit * share, limit * share), limit)
        return _grid(-limit * share, limit * share, spec)
    low = low * _best_share(lambda share: error_of(low * share, high), low)
    high = high * _best_share(lambda share: error_of(low, high * share), high)
    return _grid(low, high, spec)


def _best_share(error_of: Callable[[float], Tensor], like: Tensor) -> Tensor:
    """The share of 1/100 ... 1 with the least error, row by row."""
    least, best = torch.full_like(like, torch.inf), torch.ones_like(like)
    for step in range(CANDIDATES, 0, -1):
        error = error_of(step / CANDIDATES)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, step / CANDIDATES, best)
    return best


def _grid(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and offset of a clipping range."""
    if spec.signed:
        return (torch.maximum(-low, high) / spec.qmax).clamp_min(MIN_SCALE), torch.zeros_like(high)
    return ((high - low) / spec.qmax).clamp_min(MIN_SCALE), low


@torch.no_grad()
def calibrate(model: PreparedModel, batches: Iterable[Tensor], progress: Callable[[], None] | None = None) -> None:
    """Sets every scale and offset: weights from themselves, activations from what the float network computes.

    Args:
        model: From `prepare`.
        batches: float32 `[N, 3, H, W]` in 0..1, from the training split.
        progress: Called after each batch.
    """
    model.eval()
    samples = _observe(model, batches, progress)
    # Below -8 SiLU is flat: a range that reaches as far down as its input does wastes most of the grid.
    silu_inputs = model.placement.inner & set(model.convs())
    for group, quantizer in model.quantizers().items():
        sample = samples[group]
        low, high = torch.tensor([sample.low]), torch.tensor([sample.high])
        seen_as = F.silu if group in silu_inputs else None
        _set(quantizer, *search_range(torch.cat(sample.values)[None], low, high, quantizer.spec, seen_as))
    for conv in model.convs().values():
        if conv.quantizer is not None:
            _calibrate_weight(conv.weight, conv.quantizer)


@torch.no_grad()
def refine_outputs(
    model: PreparedModel,
    images: Tensor,
    decode: Callable[[Sequence[Tensor]], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Shrinks the ranges of the raw head maps as far as detections gain by it.

    A head map mixes box offsets with scores whose logits reach far below anything that is ever detected; the least
    squared error spends the grid on those.

    Args:
        model: Calibrated.
        images: float32 `[N, 3, H, W]` in 0..1, from the training split.
        decode: Raw head maps to detections.
        loss: How much detections (first) differ from those of the exact maps (second).
    """
    model.set_activations(False)
    model.set_weights(False)
    maps = model(images)
    exact = decode(maps)
    model.set_activations(True)
    model.set_weights(True)
    for index, quantizer in enumerate(model.output_quantizers()):
        if quantizer is None:
            continue
        # Zero belongs to every grid, also where all scores of a level lie below it.
        low, high = maps[index].amin().clamp_max(0), maps[index].amax().clamp_min(0)
        shrunk = [1.0, 1.0]  # shares of the low and of the high end
        for end in (0, 1):
            losses = {}
            for share in OUTPUT_SHARES:
                shrunk[end] = share
                _set(quantizer, *_grid(low * shrunk[0], high * shrunk[1], quantizer.spec))
                rounded = quantizer(maps[index])
                losses[share] = loss(decode((*maps[:index], rounded, *maps[index + 1 :])), exact).item()
            shrunk[end] = min(losses, key=losses.__getitem__)
        _set(quantizer, *_grid(low * shrunk[0], high * shrunk[1], quantizer.spec))


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


@torch.no_grad()
def _calibrate_weight(weight: Tensor, quantizer: Quantizer) -> None:
    rows = weight.flatten()[None] if quantizer.spec.granularity == "per_tensor" else weight.flatten(1)
    limit = rows.abs().amax(1)
    _set(quantizer, *search_range(rows, -limit, limit, quantizer.spec))


@torch.no_grad()
def _set(quantizer: Quantizer, scale: Tensor, offset: Tensor) -> None:
    quantizer.scale.copy_(scale.reshape(quantizer.scale.shape))
    quantizer.offset.copy_(offset.reshape(quantizer.scale.shape))
