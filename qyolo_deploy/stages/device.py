"""Finishing a TensorRT engine on its device: built, measured and judged from a bundle, without the training stack."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.console import Reporter
from qyolo_deploy.data.dataset import find_input, load_dataset
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.engines.base import Runner, open_engine
from qyolo_deploy.engines.tensorrt_build import build_plan
from qyolo_deploy.engines.tensorrt_file import write_engine
from qyolo_deploy.engines.tensorrt_runtime import Flavor, find_device, import_tensorrt
from qyolo_deploy.engines.tensorrt_spec import BuildSpec, read_spec
from qyolo_deploy.errors import InputError, RuntimeMissingError
from qyolo_deploy.release.verify import VerifiedRelease, sign_release
from qyolo_deploy.stages.device_release import REPORT_NAME, VIEW, source_release, write_device_release
from qyolo_deploy.validate.gates import GateResult, check_gates
from qyolo_deploy.validate.report import EvalReport
from qyolo_deploy.validate.run import settings_for, validate_runner

_RELEASE = "release"


@dataclass(frozen=True)
class DeviceResult:
    """What was built and measured.

    Args:
        engine: The `.engine`.
        plan: The same without the header.
        record: Where it was built.
        report: Of the measured engine; None if it was only built.
        gates: Those of the recipe that name it; empty if it was only built.
        release: Folder of the release; None if the engine was not measured, failed a gate, or came from no release.
    """

    engine: Path
    plan: Path
    record: dict[str, Any]
    report: EvalReport | None
    gates: tuple[GateResult, ...]
    release: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether no gate failed."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `qyolo engine build --json` prints it and `tensorrt_report.json` holds it."""
        return {
            "engine": str(self.engine),
            "plan": str(self.plan),
            "record": self.record,
            "status": "built, not run" if self.report is None else "built",
            "views": [] if self.report is None else [self.report.to_json()],
            "gates": [result.to_json() for result in self.gates],
            "passed": self.passed,
            "release": None if self.release is None else str(self.release),
        }


def build_on_device(
    bundle: Path,
    data: str | None,
    out: Path | None,
    flavor: Flavor | None,
    reporter: Reporter,
    sign_key: Path | None = None,
) -> DeviceResult:
    """Builds the engine of a bundle, measures it if there are data, and releases what was measured and passed.

    Args:
        bundle: A `build.json`, the folder with it, or a build or release with `engines/tensorrt/`.
        data: Dataset to measure on; None only builds.
        out: Folder for the engine, and for `release/` where the bundle is a release. By default that of the
            specification; of a release, which stays as it is, `<release>-tensorrt` beside it.
        flavor: Which TensorRT; by default the installed one.
        reporter: Where progress goes.
        sign_key: Private key (PEM) to sign the release with.

    Raises:
        InputError: If bundle or data are not usable, or the graph is refused.
        IntegrityError: If the bundle is a release and not what its manifest says; nothing is written then.
        RuntimeMissingError: If TensorRT or what it needs are missing.
        SelftestError: If the engine does not repeat itself.
    """
    source = source_release(bundle)
    path, spec = read_spec(bundle)
    references = _references(path, spec)
    dataset = None if data is None else load_dataset(find_input(data), "val")
    runtime = import_tensorrt(flavor)
    if dataset is not None and find_device() is None:
        raise RuntimeMissingError(
            f"{runtime.title} runs engines on a GPU only, and none was found",
            hint="Without --data the engine is built and not measured." if runtime.is_rtx else None,
        )
    folder = _folder(out, path, source)
    with reporter.progress(f"building with {runtime.title}") as tick:
        built = build_plan(runtime, path.parent, spec, tick, kept=folder)
    files = write_engine(folder, spec.name, built.plan, spec.metadata, built.record)
    result = DeviceResult(files[0], files[1], built.record.model_dump(mode="json"), None, ())
    if dataset is not None:
        runner = open_engine(files[0], conf=spec.validation.conf)
        report = _measure(runner, spec, dataset, reporter)
        result = replace(result, report=report, gates=tuple(check_gates(spec.gates, references | {VIEW: report})))
    _write_report(folder, result)
    if source is None or result.report is None or not result.passed:
        return result
    released = write_device_release(
        folder / _RELEASE, source, spec, files, runner, built.record, result.report, result.gates
    )
    if sign_key is not None:
        sign_release(released.path, sign_key)
    return replace(result, release=released.path)


def _folder(out: Path | None, spec: Path, source: VerifiedRelease | None) -> Path:
    """Where to write; a release there of an earlier engine would look like this one's and is removed.

    Raises:
        InputError: If the source would be written over.
    """
    if source is None:
        return out or spec.parent
    folder = out or source.path.absolute().with_name(f"{source.path.absolute().name}-tensorrt")
    origin = source.path.resolve()
    if origin in (folder.resolve(), *folder.resolve().parents, (folder / _RELEASE).resolve()):
        raise InputError(f"--out {folder}: expected a place beside {source.path}, which the engine is built from")
    shutil.rmtree(folder / _RELEASE, ignore_errors=True)
    return folder


def _write_report(folder: Path, result: DeviceResult) -> None:
    """Without places on this device's disk, as the file is released."""
    facts = result.to_json() | {"engine": result.engine.name, "plan": result.plan.name}
    del facts["release"]
    write_atomic(folder / REPORT_NAME, json.dumps(facts, indent=1) + "\n")


def _measure(runner: Runner, spec: BuildSpec, dataset: DetectionDataset, reporter: Reporter) -> EvalReport:
    section = spec.validation
    settings = settings_for(
        runner, spec.imgsz, conf=section.conf, iou=section.iou, max_det=section.max_det, rect=section.rect
    )
    with reporter.progress(f"validating {runner.path.name}") as tick:
        return validate_runner(runner, dataset, settings, name=VIEW, latency_runs=section.latency_runs, progress=tick)


def _references(path: Path, spec: BuildSpec) -> dict[str, EvalReport]:
    """The views that gates compare with, from the report of the build or release around the specification."""
    needed = {name for gate in spec.gates for name in (gate.view, gate.relative_to)} - {None, VIEW}
    if not needed:
        return {}
    source = path.parent.parent.parent / "report.json"
    try:
        views = json.loads(source.read_text(encoding="utf-8"))["views"]
        found = {view["name"]: EvalReport.from_json(view, str(source)) for view in views if view["name"] in needed}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{source}: expected the report of the build, which gates compare with ({type(error).__name__})",
            hint="Copy the whole release to the device.",
        ) from error
    return found
