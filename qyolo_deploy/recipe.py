"""Recipes: one YAML a product, checked before any work begins."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from qyolo_deploy.quant.spec import Granularity, LayerScheme, QuantScheme, QuantSpec

Bits = Annotated[int, Field(ge=2, le=8)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SYNTHETIC = "synthetic"
TENSORRT_GRAPH = "tensorrt_graph_on_onnxruntime"
LAST_RELEASE = "release"
PER_CLASS = "per_class."
_RESAMPLED = ("map50_95", "map50", "map75", "map_small", "map_medium", "map_large")


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class ActivationsSection(Section):
    """Grid of the convolution inputs."""

    bits: Bits = 8
    grid: Literal["asymmetric", "unsigned"] = Field(
        "asymmetric", description="With a learned offset (LSQ+), or without one, which loses values below 0"
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
    overrides: dict[str, OverrideSection] = {}
    keep_float: tuple[str, ...] = ()

    def scheme(self) -> QuantScheme:
        """The section as the scheme that `place` reads."""
        weights = self.weights
        axis = 0 if weights.granularity == "per_channel" else None
        return QuantScheme(
            weights=QuantSpec(
                weights.bits, narrow_range=weights.narrow_range, granularity=weights.granularity, axis=axis
            ),
            activations=QuantSpec(self.activations.bits, signed=False),
            offset=self.activations.grid == "asymmetric",
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
    backbone_first: Annotated[
        float, Field(ge=0, lt=1, description="Share of training in which only the backbone is quantized")
    ] = 0.0


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


class BatchSection(Section):
    """Batch sizes of a TensorRT engine with an open batch: the range that it takes, and the one it is fastest at."""

    min: Positive = 1
    opt: Positive = 1
    max: Positive = 1

    @model_validator(mode="after")
    def _is_ordered(self) -> "BatchSection":
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"expected min <= opt <= max, found {self.min}, {self.opt}, {self.max}")
        return self


class TensorRtSection(Section):
    """How TensorRT builds an engine; TensorRT-RTX decides all but workspace and batch by itself."""

    fp16: bool = Field(True, description="Half precision for convolutions that stay float")
    workspace_mib: Positive | None = Field(None, description="Memory that a kernel may use; by default all there is")
    optimization_level: Annotated[int, Field(ge=0, le=5, description="More tries more kernels and builds longer")] = 3
    batch: BatchSection = BatchSection()
    timing_cache: bool = Field(True, description="Keep the timings of kernels beside the engine for the next build")
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = Field(
        "none", description="Other GPUs that the engine is to run on, at a cost in speed"
    )
    version_compatible: bool = Field(False, description="Later minor versions of TensorRT load the engine too")
    dla_core: Annotated[int, Field(ge=0)] | None = Field(None, description="Core of Jetson's DLA; by default the GPU")
    gpu_layers: tuple[str, ...] = Field((), description="Globs of layers that run on the GPU although the DLA could")


class NmsSection(Section):
    """Thresholds of the suppression inside the engines; the defaults are those of `validate`."""

    conf: Fraction = Field(0.001, description="Programs want about 0.25, mAP a low one")
    iou: Fraction = 0.6
    max_det: Positive = 300


class ExportSection(Section):
    """Engines to build."""

    targets: Annotated[tuple[Literal["onnxruntime", "openvino", "tensorrt"], ...], Field(min_length=1)] = (
        "onnxruntime",
        "openvino",
    )
    storage: Literal["int8", "int4"] = Field("int8", description="Container of weights of at most 4 bits")
    dynamic: bool = Field(True, description="Batch and image size open; false fixes 1 x 3 x imgsz x imgsz")
    head: Literal["decoded", "raw"] = Field(
        "decoded",
        description="raw ends the engines at the head maps and leaves decoding to the runner, which does it for "
        "candidates above the confidence threshold alone; ultralytics reads decoded ones only",
    )
    nms: NmsSection | None = Field(
        None, description="Ends the engines with non-maximum suppression: [N, max_det, 6]; `true` takes the defaults"
    )
    tensorrt: TensorRtSection = TensorRtSection()

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the engines' views. A TensorRT engine may not run where it is built: its graph is measured too."""
        return (*self.targets, *((TENSORRT_GRAPH,) if "tensorrt" in self.targets else ()))

    @field_validator("nms", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """As ultralytics' `nms=True`."""
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _suppresses_decoded(self) -> "ExportSection":
        if self.nms is not None and self.head == "raw":
            raise ValueError("nms: expected none with head raw, whose maps the runner decodes and suppresses")
        return self

    @model_validator(mode="after")
    def _tensorrt_fits(self) -> "ExportSection":
        if self.nms is not None and "tensorrt" in self.targets:
            raise ValueError("nms: expected none for the target tensorrt, whose engines leave suppression to programs")
        if self.tensorrt.batch != BatchSection() and not self.dynamic:
            raise ValueError("tensorrt.batch needs dynamic: true, else the batch is 1")
        if self.tensorrt.gpu_layers and self.tensorrt.dla_core is None:
            raise ValueError("tensorrt.gpu_layers needs tensorrt.dla_core")
        return self


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
    last_release: str | None = Field(
        None, description="Folder of the last release, or its report.json, for gates `relative_to: release`"
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
    """

    view: str
    metric: str
    op: Literal[">=", "<=", ">", "<"]
    bound: FiniteFloat
    relative_to: str | None = None
    mode: Literal["difference", "ratio"] = "difference"
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = None

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
    def _labels_of_all_tiles(self) -> "Recipe":
        """A mosaic of labelled and unlabelled images would teach that the latter show nothing."""
        if self.data.unlabeled and self.train.loss.labels and self.train.augment.mosaic:
            raise ValueError("train.augment.mosaic: expected 0 where loss.labels trains beside data.unlabeled")
        return self

    @model_validator(mode="after")
    def _gates_name_views(self) -> "Recipe":
        """A gate on a view that is never measured would fail, but only after all the training."""
        views = ("float", "fake_quantized", *self.export.views)
        for index, gate in enumerate(self.gates):
            if gate.relative_to == LAST_RELEASE and self.validate_.last_release is None:
                raise ValueError(f"gates.{index}.relative_to: release needs validate.last_release")
            for key, known in (("view", views), ("relative_to", (*views, LAST_RELEASE))):
                if (name := getattr(gate, key)) not in (None, *known):
                    raise ValueError(f"gates.{index}.{key}: expected one of {', '.join(known)}, found {name!r}")
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
