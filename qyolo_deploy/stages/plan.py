"""What a recipe names outside its build: where it lies, and the digests that decide stages."""

from collections.abc import Callable
from pathlib import Path

from qyolo_deploy.artifact import package_versions, sha256_json
from qyolo_deploy.data.calibration import read_calibration_set
from qyolo_deploy.data.dataset import digest_dataset, find_input, load_dataset
from qyolo_deploy.data.images import list_images
from qyolo_deploy.data.synthetic import GENERATOR_VERSION
from qyolo_deploy.engines.tensorrt_runtime import FLAVORS, find_device
from qyolo_deploy.errors import InputError
from qyolo_deploy.recipe import SYNTHETIC, Recipe
from qyolo_deploy.stages.context import BUILTIN, builtin_weights
from qyolo_deploy.validate.last_release import report_of_release

# Another version of these may give another engine or another number from the same engine.
_RUNTIMES = ("onnxruntime", "openvino")


class Plan:
    """A recipe with all files that it names found.

    Args:
        recipe: The recipe.
        path: Its file, beside which files are looked for.
        data: Dataset that replaces the recipe's `data.source`.

    Raises:
        InputError: A file is not where it was looked for.
    """

    def __init__(self, recipe: Recipe, path: Path, data: str | Path | None) -> None:
        self.recipe = recipe
        source = str(data) if data is not None else recipe.data.source
        self.source = None if source == SYNTHETIC else find_input(source, path)
        unlabeled = recipe.data.unlabeled
        self.unlabeled = None if unlabeled is None else find_input(unlabeled, path, "data.unlabeled")
        calibration = recipe.data.calibration
        self.calibration = None if calibration is None else find_input(calibration, path, "data.calibration")
        release = recipe.validate_.last_release
        self.release = None if release is None else find_input(release, path, "validate.last_release")
        weights = recipe.model.weights
        self.weights: Path | None = None
        if weights is not None:
            self.weights = (
                builtin_weights(weights) if weights.startswith(BUILTIN) else find_input(weights, path, "weights")
            )
            if not self.weights.is_file():
                raise InputError(f"{path}: model.weights: '{weights}' is not a file")
        architecture = recipe.model.architecture
        if architecture is not None and architecture.endswith((".yaml", ".yml")):
            architecture = str(find_input(architecture, path, "architecture"))
        self.architecture = architecture

    def inputs(self, stage: str, sha256: Callable[[Path], str]) -> dict[str, str]:
        """Digests of the files outside the build that decide a stage."""
        found: dict[str, str] = {}
        if stage == "data" and self.source is None:
            found["scenes"] = sha256_json([GENERATOR_VERSION, self.recipe.model.imgsz])
        elif stage == "data" and self.source is not None:
            for split in ("train", "val"):
                found[split] = digest_dataset(load_dataset(self.source, split), sha256)
        if stage == "data" and self.unlabeled is not None:
            images = [[str(path.relative_to(self.unlabeled)), sha256(path)] for path in list_images(self.unlabeled)]
            found["unlabeled"] = sha256_json(images)
        if stage == "data" and self.calibration is not None:
            found["calibration"] = read_calibration_set(self.calibration).digest
        if stage == "validate" and self.release is not None:
            found["last release"] = sha256(report_of_release(self.release))
        if stage == "train":
            found["inside activations"] = str("onnxruntime" in self.recipe.export.targets)
        if stage == "float" and self.weights is not None:
            found["weights"] = sha256(self.weights)
        if stage == "float" and self.architecture is not None and Path(self.architecture).is_file():
            found["architecture"] = sha256(Path(self.architecture))
        if stage == "export" and "tensorrt" in self.recipe.export.targets:  # its build.json takes them to the device
            found["proof"] = sha256_json([self.recipe.section(name) for name in ("validate", "gates")])
        if stage in ("export", "validate"):
            found |= {f"{name} version": version for name, version in package_versions(_RUNTIMES).items()}
            if "tensorrt" in self.recipe.export.targets:
                found |= {f"{name} version": version for name, version in package_versions(FLAVORS).items()}
                found["gpu"] = str(find_device())
        return found
