"""Stage `release`: engines, model, report and recipe with a manifest that vouches for each byte."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qyolo_deploy import __version__
from qyolo_deploy.artifact import environment_fingerprint, sha256_file
from qyolo_deploy.device.selftest import selftest
from qyolo_deploy.engines.base import Runner, engine_files, open_engine
from qyolo_deploy.engines.requirements import minimum_version
from qyolo_deploy.errors import GateFailedError, SelftestError
from qyolo_deploy.recipe import TENSORRT_GRAPH
from qyolo_deploy.release.bundle import write_release
from qyolo_deploy.release.manifest import (
    Calibration,
    CreatedWith,
    EngineEntry,
    GateEntry,
    LineageEntry,
    ModelCard,
    Postprocessing,
    Preprocessing,
    RawHead,
    RecipeRef,
    ReleaseInfo,
)
from qyolo_deploy.release.sbom import sbom_text
from qyolo_deploy.release.sbom_engine import SBOM_NAME
from qyolo_deploy.release.verify import VerifiedRelease, verify_release
from qyolo_deploy.stages.context import StageContext, StageOutput
from qyolo_deploy.stages.golden import Subject, choose_pictures, make_golden

PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "numpy")
_FORMATS = {
    "float": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    TENSORRT_GRAPH: "onnx",
}
_RUNTIME_OF = {"float": "onnxruntime", TENSORRT_GRAPH: "onnxruntime"}
_MACHINE = ("machine", "cpu")
_RECIPE = "recipe.resolved.yaml"
# They tell latencies, and the manifest tells digests of the others.
_VARYING = ("manifest.json", "report.html", "report.json")


def run(context: StageContext) -> StageOutput:
    """Writes and verifies `release/`.

    Raises:
        GateFailedError: If a gate did not pass: what did not prove itself does not ship.
        SelftestError: If an engine does not repeat its own golden vectors.
    """
    gates = context.artifacts["validate"].info["gates"]
    if failed := [gate for gate in gates if not gate["passed"]]:
        raise GateFailedError(f"{len(failed)} of {len(gates)} gates failed: {failed[0]['reason']}")
    info = _info(context, gates)
    runners = {
        engine.view: open_engine(context.folder / engine.path, engine.precision_hint or "f32", info.postprocessing.conf)
        for engine in info.engines
    }
    info = info.model_copy(update={"engines": tuple(_with_head(engine, runners) for engine in info.engines)})
    files: dict[str, Path | bytes] = {**_files(context), **_golden(context, info, runners)}
    files[SBOM_NAME] = sbom_text(info, files).encode()
    folder = write_release(context.folder / "release", files, info)
    verified = verify_release(folder)
    try:
        _prove(verified)
    except SelftestError:
        shutil.rmtree(folder)
        raise
    return StageOutput("release", engine_files(folder), {"digest": verified.digest, "size_bytes": verified.size_bytes})


def _with_head(engine: EngineEntry, runners: dict[str, Runner]) -> EngineEntry:
    head = runners[engine.view].head
    return engine if head is None else engine.model_copy(update={"raw_head": RawHead(**asdict(head))})


def _golden(context: StageContext, info: ReleaseInfo, runners: dict[str, Runner]) -> dict[str, bytes]:
    thresholds, recipe = info.postprocessing, context.recipe
    subjects = {engine.view: Subject(runners[engine.view], engine.scheme) for engine in info.engines}
    source = recipe.release.golden_images
    judge = runners[next((target for target in recipe.export.targets if target in runners), "float")]
    pictures = choose_pictures(source, context.dataset, recipe.model.imgsz, judge, thresholds)
    return make_golden(subjects, pictures, thresholds, source)


def _prove(release: VerifiedRelease) -> None:
    """Runs the golden vectors as a device will, from the files that it will have.

    Raises:
        SelftestError: An engine does not repeat itself.
    """
    for check in selftest(release):
        if check.status != "ok":
            raise SelftestError(f"{release.path}: {check.describe()}")


def _files(context: StageContext) -> dict[str, Path]:
    """Source by path in the release; engines keep their places."""
    root = context.folder
    files = {name: root / name for name in (_RECIPE, "report.json", "report.html")}
    files["model.safetensors"] = root / "correct" / "model.safetensors"
    for path in context.artifacts["export"].info["engines"].values():
        files |= {file.relative_to(root).as_posix(): file for file in engine_files(root / path)}
    # With what a device needs to build its own engine.
    tensorrt = context.artifacts["export"].info.get("tensorrt", {"files": []})
    return files | {name: root / name for name in tensorrt["files"]}


def _info(context: StageContext, gates: list[dict[str, Any]]) -> ReleaseInfo:
    recipe, artifacts = context.recipe, context.artifacts
    model = artifacts["float"].info
    return ReleaseInfo(
        name=recipe.name,
        version=recipe.release.version,
        created_with=CreatedWith(qyolo_deploy=__version__, environment=environment_fingerprint(PACKAGES)),
        recipe=RecipeRef(path=_RECIPE, sha256=sha256_file(context.folder / _RECIPE)),
        lineage=tuple(
            LineageEntry(stage=stage, key=artifact.key, inputs=artifact.inputs, output=artifact.digest)
            for stage, artifact in artifacts.items()
        ),
        model=ModelCard(
            family=model["spec"]["family"],
            architecture=context.stem,
            names=tuple(model["spec"]["names"]),
            strides=tuple(model["spec"]["strides"]),
            anchors=_anchors(model["spec"]),
            imgsz=recipe.model.imgsz,
            parameters=model["parameters"],
        ),
        datasets={split: artifacts["data"].info[split]["digest"] for split in ("train", "val")},
        calibration=_calibration(context),
        preprocessing=Preprocessing(letterbox=recipe.validate_.letterbox),
        postprocessing=Postprocessing(
            conf=recipe.validate_.conf,
            iou=recipe.validate_.iou,
            max_det=recipe.validate_.max_det,
            multi_label=True,
        ),
        engines=tuple(
            _engine(context, view) for view in artifacts["validate"].info["views"] if "engine" in view["digests"]
        ),
        gates=tuple(GateEntry(**gate) for gate in gates),
        varying=_VARYING,
        licenses={"model": recipe.release.license, "qyolo_deploy": "AGPL-3.0-or-later"},
    )


def _anchors(spec: dict[str, Any]) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Pairs of width and height a level, from the flat lists of YOLOv5's configuration."""
    levels = spec["config"]["anchors"] if spec["family"] == "yolov5" else ()
    return tuple(tuple((float(w), float(h)) for w, h in zip(level[::2], level[1::2], strict=True)) for level in levels)


def _calibration(context: StageContext) -> Calibration:
    recorded = context.artifacts["data"].info.get("calibration")
    limit = context.recipe.data.calibration_images
    if recorded is None:
        return Calibration(images=min(limit, context.artifacts["data"].info["train"]["images"]))
    images = min(limit, recorded["images"])
    return Calibration(images=images, name=recorded["name"], digest=recorded["digest"])


def _engine(context: StageContext, view: dict[str, Any]) -> EngineEntry:
    name = view["name"]
    artifact = context.artifacts["validate"]
    runtime = _RUNTIME_OF.get(name, name)
    target = "tensorrt" if name == TENSORRT_GRAPH else name
    storage = "float32" if name == "float" else context.recipe.export.storage_of(target)
    metrics = {key: view[key] for key in ("map50_95", "map50", "map75")}
    return EngineEntry(
        view=name,
        path=context.artifacts["export"].info["engines"][name],
        format=_FORMATS[name],
        scheme="fp32" if name == "float" else context.artifacts["train"].info["scheme"],
        storage=storage,
        precision_hint=view["precision_hint"],
        min_runtime_version=minimum_version(runtime, storage),
        digest=view["digests"]["engine"],
        size_bytes=view["size_bytes"],
        validated_with={
            name: version for name, version in artifact.environment.items() if name in (runtime, *_MACHINE)
        },
        validated_on={"val": view["digests"]["data"]},
        metrics=metrics | {f"latency_ms_{key}": value for key, value in (view["latency_ms"] or {}).items()},
    )
