"""What a stage is given and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qyolo_deploy.artifact import Artifact
from qyolo_deploy.console import Reporter
from qyolo_deploy.data.calibration import read_calibration_set
from qyolo_deploy.data.calibration_check import select_images
from qyolo_deploy.data.dataset import DetectionDataset, load_dataset
from qyolo_deploy.data.unlabeled import add_unlabeled
from qyolo_deploy.recipe import Recipe

BUILTIN = "builtin:"
_ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class StageContext:
    """Everything that a stage may read.

    Args:
        recipe: The resolved recipe.
        folder: Root of the build.
        key: The stage's key.
        source: The dataset as found; None where the data stage generates it.
        unlabeled: Folder of images without annotations, if the recipe names one.
        calibration: File of the calibration subset, if the recipe names one.
        weights: The checkpoint as found; None for random weights.
        architecture: Name or path of the architecture; None takes the checkpoint's.
        artifacts: What the stages before it left, by stage.
        reporter: Where progress goes.
        device: Name of what training computes on, as `training_device` takes it.
        previous_release: Folder or report of the last release, if the recipe names one.
    """

    recipe: Recipe
    folder: Path
    key: str
    source: Path | None
    unlabeled: Path | None
    calibration: Path | None
    weights: Path | None
    architecture: str | None
    artifacts: Mapping[str, Artifact]
    reporter: Reporter
    device: str = "cpu"
    previous_release: Path | None = None

    @property
    def dataset(self) -> Path:
        """Dataset YAML or folder that all later stages read."""
        return self.source if self.source is not None else self.folder / "data" / "synthetic.yaml"

    def training_data(self) -> DetectionDataset:
        """The training split, with the unlabelled images behind it."""
        dataset = load_dataset(self.dataset, "train")
        return dataset if self.unlabeled is None else add_unlabeled(dataset, self.unlabeled)

    def calibration_data(self) -> DetectionDataset:
        """The calibration subset's images of the training split in its order, without one all of `training_data`.

        Raises:
            InputError: The subset's file is not usable, or an image is missing.
            IntegrityError: An image is another one than recorded.
        """
        if self.calibration is None:
            return self.training_data()
        return select_images(read_calibration_set(self.calibration), load_dataset(self.dataset, "train")).dataset

    @property
    def stem(self) -> str:
        """First part of engine file names: the model's name."""
        if self.recipe.model.weights is not None:
            return Path(self.recipe.model.weights.removeprefix(BUILTIN)).stem
        return Path(str(self.recipe.model.architecture)).stem

    def lineage(self) -> dict[str, str]:
        """Digests of all that went before."""
        return {stage: artifact.digest for stage, artifact in self.artifacts.items()}


@dataclass(frozen=True)
class StageOutput:
    """What a stage leaves.

    Args:
        kind: What the files are.
        files: Paths of the files that it wrote, below the build folder.
        info: Facts for later stages and reports, JSON values.
    """

    kind: str
    files: list[Path]
    info: dict[str, Any] = field(default_factory=dict)


def builtin_weights(name: str) -> Path:
    """Path of a checkpoint that the package brings, such as `builtin:quickstart`."""
    return _ASSETS / f"{name.removeprefix(BUILTIN)}.safetensors"
