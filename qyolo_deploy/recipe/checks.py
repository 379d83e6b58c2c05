"""Sections of a recipe about what is measured, what it must reach, and what is released."""

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, model_validator

from qyolo_deploy.recipe.base import Fraction, Positive, Section

LAST_RELEASE = "release"
SOFT_ROUNDED = "soft_rounded"
TORCH_VIEWS = ("fake_quantized", SOFT_ROUNDED)
"""Views that are computed in torch; every view but these is an engine."""
PER_CLASS = "per_class."
SensitivityMetric = Literal["sqnr", "map", "loss"]
_RESAMPLED = ("map50_95", "map50", "map75", "map_small", "map_medium", "map_large")


class SensitivitySection(Section):
    """How it is measured what the quantization of each tensor alone costs."""

    metric: SensitivityMetric = Field(
        "sqnr", description="SQNR of the raw head maps; mAP50-95 lost or detection loss gained cost far more time"
    )
    images: Positive = Field(8, description="Of the validation split, evenly spread")


class ValidateSection(Section):
    """How accuracy and latency are measured."""

    conf: Fraction = 0.001
    iou: Fraction = 0.6
    max_det: Positive = 300
    rect: bool = Field(True, description="Letterbox to multiples of 32 instead of a square")
    latency_runs: Positive = 50
    parity_images: Annotated[int, Field(ge=0)] = Field(
        2, description="Images on which each engine is compared with the fake-quantized model layer by layer"
    )
    soft_rounding: bool = Field(
        False,
        description="Also measure the trained model with weights near a rounding threshold left unrounded, as the view "
        "`soft_rounded`: a diagnostic of oscillations, which no engine can hold",
    )
    sensitivity: SensitivitySection | None = Field(
        None,
        description="Have the report tell what each tensor's quantization costs; what `qyolo sensitivity` has "
        "measured on the same grids and images is not measured again",
    )
    last_release: str | None = Field(
        None,
        description="Folder of the last release, or its report.json, for gates `relative_to: release`; not of the "
        "release that this build replaces",
    )

    @property
    def letterbox(self) -> Literal["rect", "square"]:
        """The letterbox by its usual name."""
        return "rect" if self.rect else "square"


class Gate(Section):
    """A condition on one number of one view's report, which decides the exit code of a build.

    Attributes:
        view: The report's name, such as `onnxruntime`.
        metric: Where the number stands in the report's JSON, such as `map50_95`, `latency_ms.p50`,
            `size_bytes`, `per_class.person`, `parity.min_sqnr_db`, `parity.differing`. Accuracies are fractions.
        op: How the value must relate to the bound.
        bound: In the unit of the metric, or a ratio.
        relative_to: Another view, or `release` for the same view of the last release; the value is then not the
            number itself but its relation to the other's.
        mode: That relation: `difference` (observed - reference) or `ratio` (observed / reference).
        confidence: The bound must hold for this share of the resampled images (paired bootstrap) rather than on the
            images as they are; accuracies only. A last release's number counts as exact.
        at: Where it is checked: in the `build`, or by `qyolo engine build` on the `device` alone, where an engine of
            TensorRT runs at last.
    """

    view: str
    metric: str
    op: Literal[">=", "<=", ">", "<"]
    bound: FiniteFloat
    relative_to: str | None = None
    mode: Literal["difference", "ratio"] = "difference"
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = None
    at: Literal["build", "device"] = "build"

    @model_validator(mode="after")
    def _check_place(self) -> "Gate":
        if self.at == "device" and "tensorrt" not in (self.view, self.relative_to):
            raise ValueError("at device needs the view tensorrt, the only one that is measured there")
        if self.at == "device" and (self.confidence is not None or self.relative_to == LAST_RELEASE):
            raise ValueError("at device takes neither confidence nor relative_to release, which are the build's alone")
        return self

    @model_validator(mode="after")
    def _check_confidence(self) -> "Gate":
        if self.confidence is not None and self.metric not in _RESAMPLED and not self.metric.startswith(PER_CLASS):
            raise ValueError(f"confidence is for {', '.join(_RESAMPLED)} and {PER_CLASS}<name>, not for {self.metric}")
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> "Gate":
        if self.relative_to is None and self.mode == "ratio":
            raise ValueError("mode ratio needs relative_to, the view to compare with")
        if self.relative_to == self.view:
            raise ValueError(f"relative_to is {self.view!r}, the view itself")
        return self


class ReleaseSection(Section):
    """What the manifest says about the release."""

    version: str = "1.0.0"
    license: str = Field("AGPL-3.0-or-later", description="Licence of the released model")
    golden_images: Literal["generated", "validation"] = Field(
        "generated",
        description="Inputs of the golden vectors: generated scenes, which carry nobody's rights, or images of the "
        "validation split, which are then passed on with the release",
    )
