"""Finishing a TensorRT engine on its device: built, measured and judged from a bundle, without the training stack."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.console import Reporter
from qyolo_deploy.data.dataset import find_input, load_dataset
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.engines.base import open_engine
from qyolo_deploy.engines.tensorrt_build import build_plan
from qyolo_deploy.engines.tensorrt_file import write_engine
from qyolo_deploy.engines.tensorrt_runtime import Flavor, find_device, import_tensorrt
from qyolo_deploy.engines.tensorrt_spec import BuildSpec, read_spec
from qyolo_deploy.errors import InputError, RuntimeMissingError
from qyolo_deploy.validate.gates import GateResult, check_gates
from qyolo_deploy.validate.report import EvalReport
from qyolo_deploy.validate.run import settings_for, validate_runner

_VIEW = "tensorrt"
_REPORT_NAME = "tensorrt_report.json"


@dataclass(frozen=True)
class DeviceResult:
    """What was built and measured.

    Args:
        engine: The `.engine`.
        plan: The same without the header.
        record: Where it was built.
        report: Of the measured engine; None if it was only built.
        gates: Those of the recipe that name it; empty if it was only built.
    """

    engine: Path
    plan: Path
    record: dict[str, Any]
    report: EvalReport | None
    gates: tuple[GateResult, ...]

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
            "gates": [
                {**result.gate.model_dump(), "passed": result.passed, "reason": result.reason} for result in self.gates
            ],
            "passed": self.passed,
        }


def build_on_device(
    bundle: Path, data: str | None, out: Path | None, flavor: Flavor | None, reporter: Reporter
) -> DeviceResult:
    """Builds the engine of a bundle, and measures it if there are data.

    Args:
        bundle: A `build.json`, the folder with it, or a build or release with `engines/tensorrt/`.
        data: Dataset to measure on; None only builds.
        out: Folder for the engine; by default that of the specification.
        flavor: Which TensorRT; by default the installed one.
        reporter: Where progress goes.

    Raises:
        InputError: If bundle or data are not usable, or the graph is refused.
        RuntimeMissingError: If TensorRT or what it needs are missing.
    """
    path, spec = read_spec(bundle)
    references = _references(path, spec)
    dataset = None if data is None else load_dataset(find_input(data), "val")
    runtime = import_tensorrt(flavor)
    if dataset is not None and find_device() is None:
        raise RuntimeMissingError(
            f"{runtime.title} runs engines on a GPU only, and none was found",
            hint="Without --data the engine is built and not measured." if runtime.is_rtx else None,
        )
    with reporter.progress(f"building with {runtime.title}") as tick:
        built = build_plan(runtime, path.parent, spec, tick)
    engine, plan, _ = write_engine(out or path.parent, spec.name, built.plan, spec.metadata, built.record)
    report = None if dataset is None else _measure(engine, spec, dataset, reporter)
    gates = () if report is None else tuple(check_gates(spec.gates, references | {_VIEW: report}))
    result = DeviceResult(engine, plan, built.record.model_dump(mode="json"), report, gates)
    write_atomic(engine.with_name(_REPORT_NAME), json.dumps(result.to_json(), indent=1) + "\n")
    return result


def _measure(engine: Path, spec: BuildSpec, dataset: DetectionDataset, reporter: Reporter) -> EvalReport:
    section = spec.validation
    runner = open_engine(engine, conf=section.conf)
    settings = settings_for(
        runner, spec.imgsz, conf=section.conf, iou=section.iou, max_det=section.max_det, rect=section.rect
    )
    with reporter.progress(f"validating {engine.name}") as tick:
        return validate_runner(runner, dataset, settings, name=_VIEW, latency_runs=section.latency_runs, progress=tick)


def _references(path: Path, spec: BuildSpec) -> dict[str, EvalReport]:
    """The views that gates compare with, from the report of the build or release around the specification."""
    needed = {name for gate in spec.gates for name in (gate.view, gate.relative_to)} - {None, _VIEW}
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
