"""Sections of a recipe about the engines to build."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from qyolo_deploy.recipe.base import Fraction, Positive, Section

TENSORRT_GRAPH = "tensorrt_graph_on_onnxruntime"

Container = Literal["int8", "int4", "int2"]


def _kind_of_storage(value: Any) -> str:
    return "by_target" if isinstance(value, dict) else "one"


Storage = Annotated[
    Annotated[Container, Tag("one")] | Annotated[dict[Literal["onnxruntime", "openvino"], Container], Tag("by_target")],
    Discriminator(_kind_of_storage),
]
STORAGE_TAGS = ("one", "by_target")  # which pydantic puts between the keys that it names


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

    activations: Literal["int8", "float"] = Field(
        "int8",
        description="float rounds weights alone and stores those of at most 4 bits as INT4: smaller, in float kernels",
    )
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
    storage: Storage = Field(
        "int8",
        description="Narrowest container of weights, each layer taking the narrowest that holds its grid: int4 packs "
        "those of at most 4 bits, int2 those of at most 2 bits in 2, which ONNX Runtime loads from 1.24 on; OpenVINO "
        "has as many bits as the grid with either. By target where it is a mapping, in which what is left out is int8",
    )
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

    def storage_of(self, target: str) -> str:
        """Narrowest container of weights that a target's file may have.

        TensorRT's kernels take packed weights beside float activations alone.
        """
        if target == "tensorrt":
            return "int4" if self.tensorrt.activations == "float" else "int8"
        if isinstance(self.storage, str):
            return self.storage
        return next((container for name, container in self.storage.items() if name == target), "int8")

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
