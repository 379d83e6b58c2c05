"""Accuracy of an engine of a release, measured again as its manifest says, as `qyolo validate RELEASE` does it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qyolo_deploy.data.dataset import find_input, load_dataset
from qyolo_deploy.data.letterbox import PAD_VALUE
from qyolo_deploy.device.selftest import open_release_engine
from qyolo_deploy.errors import InputError
from qyolo_deploy.release.manifest import Manifest, Preprocessing
from qyolo_deploy.release.verify import VerifiedRelease
from qyolo_deploy.validate.report import EvalReport
from qyolo_deploy.validate.run import LATENCY_RUNS, settings_for, validate_runner

_METRICS = ("map50_95", "map50", "map75")


@dataclass(frozen=True)
class AccuracyCheck:
    """An engine's report, and what its release promised.

    Attributes:
        report: What was measured here.
        released: The manifest's metrics of the engine.
        same_data: Whether it was measured on the very images and annotations that the release was.
    """

    report: EvalReport
    released: dict[str, float]
    same_data: bool

    def to_json(self) -> dict[str, Any]:
        """The report with `released` and `same_data`."""
        return self.report.to_json() | {"released": self.released, "same_data": self.same_data}


def validate_release(
    release: VerifiedRelease,
    data: str | Path,
    engine: str | None = None,
    split: str = "val",
    latency_runs: int = LATENCY_RUNS,
    progress: Callable[[int, int], None] | None = None,
) -> AccuracyCheck:
    """Measures COCO mAP and latency of an engine of a release, fed and read as its manifest says.

    Args:
        release: A verified release.
        data: Dataset YAML, its folder or a COCO JSON.
        engine: View; by default the first that is not the float baseline.
        split: Split of the dataset.
        latency_runs: Inferences of one image whose times count.
        progress: Called with images done and in total.

    Raises:
        InputError: The release has no such engine, its manifest asks for another pre-processing than there is, or
            the data are not usable or of other classes.
        RuntimeMissingError: The engine's runtime is not installed.
    """
    manifest = release.manifest
    entry = manifest.engines[0]
    views = {candidate.view: candidate for candidate in manifest.engines}
    if engine is not None and engine not in views:
        raise InputError(f"--engine {engine}: expected one of {', '.join(views)}")
    entry = views[engine] if engine else next((e for e in manifest.engines if e.view != "float"), entry)
    _check_preprocessing(release.path, manifest.preprocessing)
    runner = open_release_engine(release, entry)
    dataset = load_dataset(find_input(data), split)
    _check_classes(manifest, dataset.class_names, data)
    thresholds = manifest.postprocessing
    settings = settings_for(
        runner,
        manifest.model.imgsz,
        conf=thresholds.conf,
        iou=thresholds.iou,
        max_det=thresholds.max_det,
        rect=manifest.preprocessing.letterbox == "rect",
    )
    report = validate_runner(runner, dataset, settings, name=entry.view, latency_runs=latency_runs, progress=progress)
    same_data = report.digests["data"] in entry.validated_on.values()
    return AccuracyCheck(report, {key: entry.metrics[key] for key in _METRICS if key in entry.metrics}, same_data)


def _check_preprocessing(release: Path, asked: Preprocessing) -> None:
    """Refuse what a later or another tool may write, rather than measure something else."""
    known = Preprocessing(letterbox=asked.letterbox, pad_value=PAD_VALUE)
    for key, value in asked.model_dump().items():
        if value != getattr(known, key):
            expected = getattr(known, key)
            raise InputError(f"{release}: preprocessing.{key} is {value!r}, but only {expected!r} can be done")


def _check_classes(manifest: Manifest, names: tuple[str, ...], data: str | Path) -> None:
    if len(names) != len(manifest.model.names):
        raise InputError(f"{data}: has {len(names)} classes, but the release detects {len(manifest.model.names)}")
