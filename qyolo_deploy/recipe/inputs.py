"""Sections of a recipe about what goes in: model, data, grids."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qyolo_deploy.quant.spec import Granularity, LayerScheme, QuantScheme, QuantSpec
from qyolo_deploy.recipe.base import Bits, Positive, Section

SYNTHETIC = "synthetic"


class ModelSection(Section):
    """The float detector to start from, and what the quantized one changes about it."""

    weights: str | None = Field(None, description="Checkpoint (.pt or .safetensors), or `builtin:quickstart`")
    architecture: str | None = Field(None, description="Name such as yolo11n or a model YAML; needed without weights")
    imgsz: Annotated[int, Field(ge=32, multiple_of=32)] = 640
    activation: Literal["hardswish", "relu"] | None = Field(
        None, description="Replaces SiLU, which costs more than an int8 convolution; training has to heal it"
    )

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
    unlabeled: str | None = Field(None, description="Folder of images without labels, for distillation")
    calibration: str | None = Field(
        None, description="File of a calibration subset, as `qyolo calibration create` makes it: its images set scales"
    )
    calibration_images: Positive = Field(
        64,
        description="Images of the training split that set the first scales; with `calibration` at most so many of it",
    )


class WeightsSection(Section):
    """Grid of the weights."""

    bits: Bits = 8
    granularity: Granularity = "per_tensor"
    narrow_range: bool = Field(False, description="Leave out the lowest level, so that the grid is symmetric")
    reduce_range: bool = Field(
        True,
        description="Let 8-bit weights use 7 bits, so that all processors compute the same: x86 without VNNI adds two "
        "products with uint8 in 16 bits, which saturate with larger weights",
    )


class ActivationsSection(Section):
    """Grid of the convolution inputs."""

    bits: Bits = 8
    grid: Literal["asymmetric", "unsigned", "symmetric"] = Field(
        "asymmetric",
        description="With a learned offset (LSQ+); without one, which loses values below 0; or where it has 8 bits "
        "around 0, as TensorRT needs it: what TensorRT computes is then what was trained, and other targets do too",
    )


class OverrideSection(Section):
    """Bits of the layers that a glob matches."""

    weights: Bits
    activations: Bits = 8


class QuantizationSection(Section):
    """Which tensors get which grid."""

    weights: WeightsSection = WeightsSection()
    activations: ActivationsSection = ActivationsSection()
    first_last_bits: Bits = 8
    observer: Literal["mse", "minmax", "moving_average", "percentile", "entropy"] = Field(
        "mse", description="How the first activation ranges are found"
    )
    start: Literal["moments", "compensated", "ranges"] = Field(
        "moments",
        description="After range search: each channel's mean and spread matched to the float model; that and weights "
        "rounded so that each makes up for the errors of those before it (GPTQ; best without training); or nothing",
    )
    overrides: dict[str, OverrideSection] = Field(default_factory=dict)
    keep_float: tuple[str, ...] = ()

    def scheme(self) -> QuantScheme:
        """The section as the scheme that `place` reads."""
        weights = self.weights
        axis = 0 if weights.granularity == "per_channel" else None
        return QuantScheme(
            weights=QuantSpec(
                weights.bits, narrow_range=weights.narrow_range, granularity=weights.granularity, axis=axis
            ),
            activations=QuantSpec(self.activations.bits, signed=self.activations.grid == "symmetric"),
            offset=self.activations.grid != "unsigned",
            first_last_bits=self.first_last_bits,
            overrides={glob: LayerScheme(entry.weights, entry.activations) for glob, entry in self.overrides.items()},
            keep_float=self.keep_float,
            reduce_range=weights.reduce_range,
        )
