"""Sections of a recipe about what learns: float training, quantization-aware training, correction."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qyolo_deploy.quant.spec import Granularity
from qyolo_deploy.recipe.base import Fraction, Positive, Rate, Section


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
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1, description="Of SGD (Nesterov)")] = 0.937
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Rate = 10.0
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 autocasts convolutions; quantizers and losses stay in float32"
    )
    patience: Positive | None = Field(
        None, description="Validate the EMA after each epoch, stop after so many without a better mAP, keep the best"
    )
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
    features: Annotated[float, Field(ge=0, description="Outputs of the blocks against the float model's")] = 0.0

    @model_validator(mode="after")
    def _has_part(self) -> "LossSection":
        if not (self.labels or self.logits or self.detections or self.features):
            raise ValueError("expected a positive weight for labels, logits, detections or features")
        return self


class GradientSection(Section):
    """What is done to gradients beyond the straight-through rule."""

    lsq_scale: bool = Field(False, description="Scale gradients times 1 / sqrt(N qmax), as LSQ does; for SGD")
    margin: Annotated[
        float, Field(ge=0, lt=0.5, description="Values this near to a rounding threshold do not move scales, in steps")
    ] = 0.0
    latent_damping: Annotated[
        float, Field(ge=0, description="k in exp(-k |round(w/s) - w/s|) on the gradient to weights")
    ] = 0.0


class DampeningSection(Section):
    """Pulls latent weights to their levels (Nagel 2022), more and more until the end."""

    weight: Rate = Field(0.001, description="lambda at the end, on the sum over all weights")
    start: Annotated[float, Field(ge=0, lt=1, description="Share of training without it")] = 0.25


class FreezingSection(Section):
    """Fixes weights of low-bit layers that oscillate more often than a falling threshold (Nagel 2022)."""

    first: Fraction = 0.04
    last: Fraction = 0.01
    start: Annotated[float, Field(ge=0, lt=1, description="Share of training without it")] = 0.0


class RoundingSection(Section):
    """Weights of low-bit layers that oscillate learn which integer they end at (stability-driven QAT)."""

    start: Annotated[float, Field(ge=0, lt=1, description="Share of training without it")] = 0.7
    end: Annotated[
        float, Field(gt=0, le=1, description="Share of training after which they are integers and all else adapts")
    ] = 0.9
    frequency: Fraction = Field(0.005, description="Oscillation frequency above which a weight is caught")
    lr: Rate = Field(0.05, description="Of the offsets' logits at the start of this phase; it falls as all rates do")
    regularizer: Rate = Field(
        0.1, description="Weight of g^2 (1 - g^2)^2 at the end, on the sum over all caught weights; it rises from 0"
    )

    @model_validator(mode="after")
    def _ends_later(self) -> "RoundingSection":
        if self.end <= self.start:
            raise ValueError(f"end: expected more than start, {self.start}, found {self.end}")
        return self


class TrainSection(TrainingSection):
    """Quantization-aware training: learned scales, EMA of weights and scales, distillation from the float model."""

    epochs: Annotated[int, Field(ge=0)] = 3
    lr: Rate = 0.0005
    scale_lr: Rate = Field(0.001, description="Learning rate of scales and offsets, relative to each scale")
    loss: LossSection = LossSection()
    norm: Literal["running", "batch"] = Field(
        "running", description="Statistics of batch normalisation; those of batches harm short runs on little data"
    )
    reestimate_norm: Annotated[
        int, Field(ge=0, description="Batches whose statistics replace the running ones at the end")
    ] = 0
    gradient: GradientSection = GradientSection()
    oscillation_momentum: Annotated[float, Field(gt=0, lt=1, description="m of the oscillation frequency")] = 0.01
    dampening: DampeningSection | None = None
    freezing: FreezingSection | None = None
    rounding: RoundingSection | None = None
    backbone_first: Annotated[
        float, Field(ge=0, lt=1, description="Share of training in which only the backbone is quantized")
    ] = 0.0

    @model_validator(mode="after")
    def _rounds_what_is_quantized_and_free(self) -> "TrainSection":
        if self.rounding is not None and self.freezing is not None:
            raise ValueError("rounding: expected no freezing beside it, which fixes the same weights")
        if self.rounding is not None and self.rounding.start < self.backbone_first:
            raise ValueError(f"rounding.start: expected at least backbone_first, {self.backbone_first}")
        return self


class CorrectSection(Section):
    """Quantization correction: gain and shift behind each convolution, learned and folded."""

    enabled: bool = True
    state: Literal["ema", "raw"] = Field(
        "ema", description="Which of training's two states goes on to the engines, corrected or not"
    )
    learn: Literal["both", "gain", "shift"] = "both"
    granularity: Granularity = Field("per_channel", description="One gain and shift a channel, or one a layer")
    images: Positive = 128
    epochs: Positive = 1
    batch: Positive = 16
    lr: Rate = 0.001
    loss: LossSection = LossSection()
    seed: int = 0
