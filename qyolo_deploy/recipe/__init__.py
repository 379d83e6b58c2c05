"""Recipes: one YAML a product, checked before any work begins."""

from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from qyolo_deploy.recipe.base import Positive, Section
from qyolo_deploy.recipe.checks import (
    LAST_RELEASE,
    PER_CLASS,
    SOFT_ROUNDED,
    TORCH_VIEWS,
    Gate,
    ReleaseSection,
    SensitivityMetric,
    SensitivitySection,
    ValidateSection,
)
from qyolo_deploy.recipe.engines import STORAGE_TAGS, TENSORRT_GRAPH, ExportSection, NmsSection, TensorRtSection
from qyolo_deploy.recipe.inputs import SYNTHETIC, DataSection, ModelSection, QuantizationSection
from qyolo_deploy.recipe.training import (
    AugmentSection,
    CorrectSection,
    FloatSection,
    LossSection,
    TrainingSection,
    TrainSection,
)

__all__ = [
    "LAST_RELEASE",
    "PER_CLASS",
    "SOFT_ROUNDED",
    "STORAGE_TAGS",
    "SYNTHETIC",
    "TENSORRT_GRAPH",
    "TORCH_VIEWS",
    "AugmentSection",
    "CorrectSection",
    "ExportSection",
    "Gate",
    "LossSection",
    "NmsSection",
    "Positive",
    "Recipe",
    "Section",
    "SensitivityMetric",
    "SensitivitySection",
    "TensorRtSection",
    "TrainSection",
    "TrainingSection",
    "ValidateSection",
]


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
        for index, gate in enumerate(self.gates):
            if gate.relative_to == LAST_RELEASE and self.validate_.last_release is None:
                raise ValueError(f"gates.{index}.relative_to: release needs validate.last_release")
            for key, known in (("view", self.views), ("relative_to", (*self.views, LAST_RELEASE))):
                if (name := getattr(gate, key)) not in (None, *known):
                    raise ValueError(f"gates.{index}.{key}: expected one of {', '.join(known)}, found {name!r}")
        return self

    @model_validator(mode="after")
    def _soft_rounding_is_of_training(self) -> "Recipe":
        """Beside corrected engines its number would tell of correction, and not of rounding."""
        if self.validate_.soft_rounding and self.correct.enabled:
            raise ValueError("validate.soft_rounding: expected correct.enabled: false, as it is of what training left")
        return self

    @property
    def views(self) -> tuple[str, ...]:
        """Names of all views that validation measures."""
        soft = (SOFT_ROUNDED,) if self.validate_.soft_rounding else ()
        return ("float", "fake_quantized", *soft, *self.export.views)

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
