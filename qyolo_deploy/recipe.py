"""Recipes: one YAML a product, checked before any work begins."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from qyolo_deploy.quant.spec import Granularity, LayerScheme, QuantScheme, QuantSpec

Bits = Annotated[int, Field(ge=2, le=8)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SYNTHETIC = "synthetic"


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The float detector to start from."""

    weights: str | None = Field(None, description="Checkpoint (.pt or .safetensors), or `builtin:quickstart`")
    architecture: str | None = Field(None, description="Name such as yolo11n or a model YAML; needed without weights")
    imgsz: Annotated[int, Field(ge=32, multiple_of=32)] = 640

    @model_validator(mode="after")
    def _has_source(self) -> "ModelSection":
        if self.weights is None and self.architecture is None:
            raise ValueError("expected weights or architecture")
        return self


class SyntheticSection(Section):
    """Parameters of the scene generator behind `data.source: synthetic`."""

    seed: int = 0
    train_images: Positive = 640
    val_images: Positive = 160


class DataSection(Section):
    """Images for training, calibration and validation."""

    source: str = Field(description="Dataset YAML, its folder, or `synthetic`")
    synthetic: SyntheticSection = SyntheticSection()
    calibration_images: Positive = Field(64, description="Images of the training split that set the first scales")


class WeightsSection(Section):
    """Grid of the weights."""

    bits: Bits = 8
    granularity: Granularity = "per_tensor"


class ActivationsSection(Section):
    """Grid of the convolution inputs; unsigned with a zero point."""

    bits: Literal[8] = 8


class OverrideSection(Section):
    """Bits of the layers that a glob matches."""

    weights: Bits
    activations: Literal[8] = 8


class QuantizationSection(Section):
    """Which tensors get which grid."""

    weights: WeightsSection = WeightsSection()
    activations: ActivationsSection = ActivationsSection()
    first_last_bits: Literal[8] = 8
    overrides: dict[str, OverrideSection] = {}
    keep_float: tuple[str, ...] = ()

    def scheme(self) -> QuantScheme:
        """The section as the scheme that `place` reads."""
        weights = self.weights
        axis = 0 if weights.granularity == "per_channel" else None
        return QuantScheme(
            weights=QuantSpec(weights.bits, granularity=weights.granularity, axis=axis),
            activations=QuantSpec(self.activations.bits, signed=False),
            first_last_bits=self.first_last_bits,
            overrides={glob: LayerScheme(entry.weights, entry.activations) for glob, entry in self.overrides.items()},
            keep_float=self.keep_float,
        )


class AugmentSection(Section):
    """Augmentation of training images, with ultralytics' names and meanings."""

    mosaic: Fraction = 0.0
    scale: Fraction = 0.25
    translate: Fraction = 0.1
    fliplr: Fraction = 0.5
    hsv_h: Fraction = 0.015
    hsv_s: Fraction = 0.4
    hsv_v: Fraction = 0.4
    close_mosaic: Annotated[int, Field(ge=0)] = 5


class TrainingSection(Section):
    """What float training and quantization-aware training have in common."""

    epochs: Annotated[int, Field(ge=0)]
    batch: Positive = 16
    lr: Rate
    final_lr: Fraction = Field(0.01, description="Last learning rate as a share of the first (cosine)")
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998
    augment: AugmentSection = AugmentSection()
    images: Positive | None = Field(None, description="Train on this many images of the split, chosen by seed")
    workers: Annotated[int, Field(ge=0)] = 0
    seed: int = 0


class FloatSection(TrainingSection):
    """Float training before quantization; 0 epochs take the checkpoint as it is."""

    epochs: Annotated[int, Field(ge=0)] = 0
    lr: Rate = 0.002
    weight_decay: Annotated[float, Field(ge=0)] = 0.0005
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0


class LossSection(Section):
    """Weights of the parts of a loss; at least one must be positive."""

    labels: Annotated[float, Field(ge=0, description="Detection loss of the architecture, on the labels")] = 0.0
    logits: Annotated[float, Field(ge=0, description="Raw head maps against the float model's")] = 1.0
    detections: Annotated[float, Field(ge=0, description="Boxes and scores against the float model's")] = 1.0

    @model_validator(mode="after")
    def _has_part(self) -> "LossSection":
        if self.labels == 0 and self.logits == 0 and self.detections == 0:
            raise ValueError("expected a positive weight for labels, logits or detections")
        return self


class TrainSection(TrainingSection):
    """Quantization-aware training: learned scales, EMA of weights and scales, distillation from the float model."""

    epochs: Annotated[int, Field(ge=0)] = 3
    lr: Rate = 0.0005
    scale_lr: Rate = Field(0.001, description="Learning rate of scales and offsets, relative to each scale")
    loss: LossSection = LossSection()


class CorrectSection(Section):
    """Quantization correction: per-channel gain and shift, learned and folded."""

    enabled: bool = True
    images: Positive = 128
    epochs: Positive = 1
    batch: Positive = 16
    lr: Rate = 0.001
    loss: LossSection = LossSection()
    seed: int = 0


class ExportSection(Section):
    """Engines to build."""

    targets: Annotated[tuple[Literal["onnxruntime", "openvino"], ...], Field(min_length=1)] = (
        "onnxruntime",
        "openvino",
    )
    storage: Literal["int8", "int4"] = Field("int8", description="Container of weights of at most 4 bits")
    dynamic: bool = Field(True, description="Batch and image size open; false fixes 1 x 3 x imgsz x imgsz")


class ValidateSection(Section):
    """How accuracy and latency are measured."""

    conf: Fraction = 0.001
    iou: Fraction = 0.6
    max_det: Positive = 300
    rect: bool = Field(True, description="Letterbox to multiples of 32 instead of a square")
    latency_runs: Positive = 50

    @property
    def letterbox(self) -> Literal["rect", "square"]:
        """The letterbox by its usual name."""
        return "rect" if self.rect else "square"


class Gate(Section):
    """A condition on one number of one view's report, which decides the exit code of a build.

    Attributes:
        view: The report's name, such as `onnxruntime`.
        metric: Where the number stands in the report's JSON, such as `map50_95`, `latency_ms.p50`,
            `size_bytes`, `per_class.person`. Accuracies are fractions.
        op: How the value must relate to the bound.
        bound: In the unit of the metric, or a ratio.
        relative_to: Another view; the value is then not the number itself but its relation to the other's.
        mode: That relation: `difference` (observed - reference) or `ratio` (observed / reference).
    """

    view: str
    metric: str
    op: Literal[">=", "<=", ">", "<"]
    bound: FiniteFloat
    relative_to: str | None = None
    mode: Literal["difference", "ratio"] = "difference"

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


class Recipe(Section):
    """A product: model, data, quantization, training, engines, gates."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    model: ModelSection
    data: DataSection
    quantization: QuantizationSection = QuantizationSection()
    float: FloatSection = FloatSection()
    train: TrainSection = TrainSection()
    correct: CorrectSection = CorrectSection()
    export: ExportSection = ExportSection()
    validate_: ValidateSection = Field(ValidateSection(), alias="validate")
    gates: tuple[Gate, ...] = ()
    release: ReleaseSection = ReleaseSection()

    @model_validator(mode="after")
    def _square_when_static(self) -> "Recipe":
        if self.validate_.rect and not self.export.dynamic:
            raise ValueError("validate.rect needs export.dynamic: engines of a fixed size take square images")
        return self

    @model_validator(mode="after")
    def _gates_name_views(self) -> "Recipe":
        """A gate on a view that is never measured would fail, but only after all the training."""
        views = ("float", "fake_quantized", *self.export.targets)
        for index, gate in enumerate(self.gates):
            for key in ("view", "relative_to"):
                if (name := getattr(gate, key)) not in (None, *views):
                    raise ValueError(f"gates.{index}.{key}: expected one of {', '.join(views)}, found {name!r}")
        return self

    def section(self, stage: str) -> dict[str, Any]:
        """One section as plain data, for stage keys."""
        data: dict[str, Any] = self.to_dict()[stage]
        return data

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe with all defaults filled in."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """The resolved recipe as it is written beside a build."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=110)
