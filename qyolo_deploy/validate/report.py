"""The report of one view of a model (float, fake-quantized, an engine): accuracy, size, speed, origin."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from qyolo_deploy.errors import InputError
from qyolo_deploy.validate.coco_map import CocoMetrics


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class MapInterval:
    """A difference in mAP50-95 and what the choice of images leaves open of it, by paired bootstrap over images.

    Attributes:
        relative_to: The other view.
        difference: This view's mAP50-95 minus the other's.
        low: Lower end of the interval.
        high: Upper end.
        confidence: Share of the resamples between the two ends.
        resamples: Their number.
    """

    relative_to: str
    difference: float
    low: float
    high: float
    confidence: float
    resamples: int


_METRICS = tuple(f.name for f in fields(CocoMetrics))


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class EvalReport:
    """What was measured of one view, and under which conditions.

    Attributes:
        name: Of the view: `float`, `fake_quantized`, `onnxruntime`, ...
        metrics: Average precisions as fractions.
        images: Number of images.
        thresholds: `conf`, `iou`, `max_det`.
        imgsz: Length of the longer side in pixels.
        letterbox: Padded to multiples of the stride (`rect`) or to a `square`.
        precision_hint: The runtime's, where it has one.
        size_bytes: Of the engine's files.
        latency_ms: `p50`, `p95` and `p99`.
        digests: sha256 by what it is of (engine, data).
        parity: `min_sqnr_db` and `differing` of the layers against the fake-quantized model, and of how many `images`.
        interval: Of the difference to the float model.
    """

    name: str
    metrics: CocoMetrics
    images: int
    thresholds: dict[str, float]
    imgsz: int
    letterbox: Literal["rect", "square"]
    precision_hint: str | None
    size_bytes: int | None
    latency_ms: dict[str, float] | None
    digests: dict[str, str]
    parity: dict[str, float] | None = None
    interval: MapInterval | None = None

    def __post_init__(self) -> None:
        for key, value in {**self.thresholds, **(self.latency_ms or {})}.items():
            if not math.isfinite(value):
                raise ValueError(f"{key} is {value}, expected a finite number")

    def to_json(self) -> dict[str, Any]:
        """Return the report as a flat JSON object, the metrics at its top."""
        metrics = asdict(self.metrics)
        per_class = metrics.pop("per_class")
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "metrics")}
        rest["interval"] = None if self.interval is None else asdict(self.interval)
        return {"name": self.name, **metrics, **rest, "per_class": per_class}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str = "report") -> "EvalReport":
        """Read what `to_json` gave.

        Args:
            data: The JSON object.
            source: What errors call it.

        Raises:
            InputError: A key is missing, unknown or has the wrong type, or a number is not finite.
        """
        content = {k: v for k, v in data.items() if k not in _METRICS}
        content["metrics"] = {k: data[k] for k in _METRICS if k in data}
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"] if part != "metrics")
            place = f"{source}: {key}" if key else source
            raise InputError(f"{place}: {first['msg']}.") from error
