"""`qyolo sensitivity`: what the quantization of each tensor alone costs, all else in float."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qyolo_deploy.console import Tick
from qyolo_deploy.data.dataset import find_input
from qyolo_deploy.errors import InputError
from qyolo_deploy.recipe import SensitivityMetric
from qyolo_deploy.stages.compare_views import build_side

Kind = Literal["weights", "activations"]
_ROWS = 30
FOLDER = "sensitivity"
"""Of a build, for what is measured of it."""


@dataclass(frozen=True)
class Part:
    """One quantizer: that of a layer's weights, or that of tensors which share a grid.

    Attributes:
        name: Of the layer, or of the first of the tensors.
        kind: `weights` or `activations`.
        bits: Of its grid.
        layers: Whose overrides decide the bits; none for tensors that no convolution reads.
    """

    name: str
    kind: Kind
    bits: int
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What a part's quantization alone costs.

    Attributes:
        part: Which one.
        sqnr_db: Of the raw head maps, against the float model's.
        lost: mAP50-95 lost, or detection loss gained, where that was asked for.
    """

    part: Part
    sqnr_db: float
    lost: float | None

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        part = asdict(self.part) | {"layers": list(self.part.layers)}
        return {**part, "sqnr_db": self.sqnr_db, "lost": self.lost}


@dataclass(frozen=True)
class Sensitivity:
    """A model's parts, the most costly first.

    Attributes:
        metric: What they are ranked by.
        images: Of the validation split, that it was measured on.
        baseline: mAP50-95 or detection loss of the float model, where that was asked for.
        costs: Of all parts.
        layer_bits: Layer name -> bits of its weights and of what it reads.
    """

    metric: SensitivityMetric
    images: int
    baseline: float | None
    costs: tuple[Cost, ...]
    layer_bits: Mapping[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, the most costly part first."""
        return {
            "metric": self.metric,
            "images": self.images,
            "baseline": self.baseline,
            "parts": [cost.to_json() for cost in self.costs],
        }


def sensitivity(
    build: str | Path,
    data: str | Path,
    images: int = 8,
    metric: SensitivityMetric = "sqnr",
    progress: Tick | None = None,
    kept: Path | None = None,
) -> Sensitivity:
    """Quantizes one part of a build's float model at a time and measures what that does to its outputs.

    The grids are those that the build starts from, before any training: bits by recipe, scales by its observer on the
    training split. So it can be asked before the training that it is to decide about.

    Args:
        build: Folder of a build whose float model is made.
        data: Dataset YAML, its folder or a COCO JSON.
        images: Of the validation split, evenly spread.
        metric: `sqnr` of the raw head maps; `map` or `loss` measure mAP50-95 or the detection loss as well, and rank
            by it.
        progress: Called with steps done and in total.
        kept: File in which each number is kept as soon as it is measured, so that the same measurement goes on where
            it was interrupted.

    Raises:
        InputError: If the build or the data are not usable.
    """
    if metric not in get_args(SensitivityMetric):
        raise InputError(f"--metric {metric}: expected one of {', '.join(get_args(SensitivityMetric))}")
    measured: Sensitivity = build_side("sensitivity_measure", "sensitivity").measure_build(
        Path(build), find_input(data), images, metric, progress, kept
    )
    return measured


def override_lines(found: Sensitivity, worst: int) -> list[str]:
    """Recipe lines that give the most costly parts of fewer than 8 bits 8 bits, and leave the others' alone.

    Args:
        found: The ranking.
        worst: How many parts.
    """
    chosen = [cost.part for cost in found.costs if cost.part.bits < 8 and cost.part.layers][:worst]
    bits: dict[str, list[int]] = {}
    for part in chosen:
        for layer in part.layers:
            bits.setdefault(layer, list(found.layer_bits[layer]))[0 if part.kind == "weights" else 1] = 8
    if not bits:
        return []
    lines = [f"    {layer}: {{weights: {weights}, activations: {inputs}}}" for layer, (weights, inputs) in bits.items()]
    return ["quantization:", "  overrides:", *lines]


def sensitivity_table(found: Sensitivity) -> tuple[list[str], list[list[str]]]:
    """Head and rows for people: the most costly parts."""
    head = ["", "tensor", "kind", "bits", "SQNR dB"]
    if found.metric != "sqnr":
        head.append("mAP lost" if found.metric == "map" else "loss gained")
    return head, [_row(rank, cost) for rank, cost in enumerate(found.costs[:_ROWS], start=1)]


def _row(rank: int, cost: Cost) -> list[str]:
    part = cost.part
    row = [str(rank), part.name, part.kind, str(part.bits), f"{cost.sqnr_db:.1f}"]
    return row if cost.lost is None else [*row, f"{cost.lost:.4f}"]
