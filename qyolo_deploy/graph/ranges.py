"""Clipping ranges of a quantizer from a sample of what it sees: five observers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qyolo_deploy.graph.fake_quantize import MIN_SCALE, round_to_grid
from qyolo_deploy.quant.spec import QuantSpec

CANDIDATES = 100
_SAMPLES_PER_CALL = 4096
_MOVING_AVERAGE = 0.9
_PERCENTILE = 0.9999
_BINS = 2048
_EPS = 1e-9


@dataclass
class Sample:
    """Extremes of all values of a tensor, batch by batch, and some of the values."""

    lows: list[Tensor] = field(default_factory=list)
    highs: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """Takes in one batch."""
        flat = x.detach().flatten()
        # Zero belongs to every grid: padding has to be exact.
        self.lows.append(flat.min().clamp_max(0))
        self.highs.append(flat.max().clamp_min(0))
        picked = torch.randint(len(flat), (_SAMPLES_PER_CALL,), generator=generator)
        self.values.append(flat[picked])

    def cut_below_zero(self) -> None:
        """For grids without an offset, which cannot hold what lies below."""
        self.lows = [torch.zeros_like(low) for low in self.lows]


def observe(
    observer: str, sample: Sample, spec: QuantSpec, seen_as: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and offset of one activation quantizer.

    Args:
        observer: `minmax`: extremes of all batches; `moving_average`: of the batches' extremes, the latest counting
            most; `percentile`: 99.99 % of the values; `mse`: least squared error; `entropy`: least divergence of the
            rounded values' distribution (the upper end only, as calibrators of runtimes do).
        sample: What was seen.
        spec: The grid.
        seen_as: What the only reader makes of the values; `mse` measures the error of that.

    Returns:
        float32 `[1]` each.
    """
    values = torch.cat(sample.values)
    low, high = torch.stack(sample.lows).min(), torch.stack(sample.highs).max()
    if observer == "moving_average":
        low, high = _moving_average(sample.lows), _moving_average(sample.highs)
    elif observer == "percentile":
        ends = torch.quantile(values, torch.tensor([1 - _PERCENTILE, _PERCENTILE]))
        low, high = torch.maximum(ends[0].clamp_max(0), low), ends[1].clamp_min(0)  # not below what was cut
    elif observer == "entropy":
        high = _least_divergence(values, low, high, spec)
    elif observer == "mse":
        return search_range(values[None], low[None], high[None], spec, seen_as)
    return grid_of(low[None], high[None], spec)


def _moving_average(extremes: Sequence[Tensor]) -> Tensor:
    value = extremes[0]
    for extreme in extremes[1:]:
        value = _MOVING_AVERAGE * value + (1 - _MOVING_AVERAGE) * extreme
    return value


def _least_divergence(values: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """The upper end whose grid keeps most of the distribution (Migacz 2017, "8-bit Inference with TensorRT")."""
    best, least = high, torch.inf
    low = -high if spec.signed else low  # a symmetric grid spends levels there, whether there are values or not
    for step in range(CANDIDATES, 0, -1):
        end = low + (high - low) * step / CANDIDATES
        if end <= 0:
            break
        divergence = _divergence(values.clamp(low, end), values[values <= end], float(low), float(end), spec)
        if divergence < least:
            best, least = end, divergence
    return best


def _divergence(clipped: Tensor, inside: Tensor, low: float, high: float, spec: QuantSpec) -> float:
    """KL from the clipped distribution to the one that levels of equal width can tell, both in 2048 bins."""
    wanted = torch.histc(clipped, _BINS, low, high)
    seen = torch.histc(inside, _BINS, low, high)
    level = (torch.arange(_BINS) * (spec.qmax - spec.qmin + 1)) // _BINS
    count = int(level[-1]) + 1
    mass = torch.zeros(count).index_add(0, level, seen)
    occupied = torch.zeros(count).index_add(0, level, (seen > 0).float()).clamp_min(1)
    spread = torch.where(seen > 0, (mass / occupied)[level], 0.0)
    p, q = wanted / wanted.sum(), spread / spread.sum().clamp_min(_EPS)
    filled = p > 0
    return float((p[filled] * (p[filled] / q[filled].clamp_min(_EPS)).log()).sum())


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
        rounded = round_to_grid(values, *grid_of(low, high, spec), spec)
        return torch.square((rounded if seen_as is None else seen_as(rounded)) - wanted).mean(1)

    if spec.signed:
        limit = torch.maximum(-low, high)
        share = _best_share(lambda share: error_of(-limit * share, limit * share), limit)
        return grid_of(-limit * share, limit * share, spec)
    low = low * _best_share(lambda share: error_of(low * share, high), low)
    high = high * _best_share(lambda share: error_of(low, high * share), high)
    return grid_of(low, high, spec)


def _best_share(error_of: Callable[[float], Tensor], like: Tensor) -> Tensor:
    """The share of 1/100 ... 1 with the least error, row by row."""
    least, best = torch.full_like(like, torch.inf), torch.ones_like(like)
    for step in range(CANDIDATES, 0, -1):
        error = error_of(step / CANDIDATES)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, step / CANDIDATES, best)
    return best


def grid_of(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and offset of a clipping range."""
    if spec.signed:
        return (torch.maximum(-low, high) / spec.qmax).clamp_min(MIN_SCALE), torch.zeros_like(high)
    return ((high - low) / spec.qmax).clamp_min(MIN_SCALE), low
