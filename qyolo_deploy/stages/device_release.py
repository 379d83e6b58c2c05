"""The release of an engine that was finished on its device: the source release, and the engine with its proof.

Nothing of the source is changed: its files keep their digests, its lineage goes on by one stage, `device`, whose input
is the source's own digest. What is added are the engine's files, its entry in the manifest, its golden vectors, the
gates that were checked here, and their report.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qyolo_deploy._version import __version__
from qyolo_deploy.artifact import environment_fingerprint, package_versions, sha256_file, sha256_json
from qyolo_deploy.device.selftest import selftest
from qyolo_deploy.engines.base import Runner
from qyolo_deploy.engines.requirements import MINIMUM
from qyolo_deploy.engines.tensorrt_file import BuildRecord
from qyolo_deploy.engines.tensorrt_spec import SPEC_NAME, BuildSpec
from qyolo_deploy.errors import IntegrityError, SelftestError
from qyolo_deploy.recipe import TENSORRT_GRAPH
from qyolo_deploy.release.bundle import write_release
from qyolo_deploy.release.golden import GOLDEN_NAME, GoldenEngine, read_golden, read_image
from qyolo_deploy.release.manifest import (
    MANIFEST_NAME,
    CreatedWith,
    EngineEntry,
    GateEntry,
    LineageEntry,
    RawHead,
    ReleaseInfo,
)
from qyolo_deploy.release.sbom_engine import SBOM_NAME, with_engine
from qyolo_deploy.release.verify import VerifiedRelease, verify_release
from qyolo_deploy.stages.golden import Picture, Subject, run_golden
from qyolo_deploy.validate.gates import GateResult
from qyolo_deploy.validate.report import EvalReport

VIEW = "tensorrt"
REPORT_NAME = "tensorrt_report.json"
_FOLDER = "engines/tensorrt"
_PACKAGES = ("numpy", "tensorrt", "tensorrt_rtx", "cuda-bindings")
_MACHINE = ("machine", "cpu")


def source_release(bundle: Path) -> VerifiedRelease | None:
    """The release that a bundle is or lies in, verified; None where it is a build's or a folder by itself.

    Raises:
        IntegrityError: It is not what its manifest says.
    """
    for root in (bundle, *bundle.absolute().parents[:3]):
        if (root / MANIFEST_NAME).is_file() and (root / _FOLDER / SPEC_NAME).is_file():
            return verify_release(root)
    return None


def write_device_release(
    out: Path,
    source: VerifiedRelease,
    spec: BuildSpec,
    files: Sequence[Path],
    runner: Runner,
    record: BuildRecord,
    report: EvalReport,
    gates: Sequence[GateResult],
) -> VerifiedRelease:
    """Writes, verifies and tries out a release.

    Args:
        out: Its folder; an older one is replaced.
        source: What the engine was built from.
        spec: What was built.
        files: The `.engine`, `.plan` and record, the engine first, then the report of the device.
        runner: The engine, loaded.
        record: Where it was built.
        report: What was measured.
        gates: All of them passed.

    Raises:
        IntegrityError: The source was changed meanwhile; no release is left then.
        SelftestError: The engine does not repeat its own golden vectors; no release is left then.
    """
    engine = files[0]
    replaced = _replaced(source)
    carried: dict[str, Path | bytes] = {
        file.path: source.path / file.path for file in source.files if file.path not in replaced
    }
    added: dict[str, Path | bytes] = {
        **{f"{_FOLDER}/{file.name}": file for file in files if file.name != REPORT_NAME},
        REPORT_NAME: engine.with_name(REPORT_NAME),
        **_golden(source, spec, runner),
    }
    entry = _entry(source, spec, engine, runner, record, report)
    info = _info(source, spec, record, entry, gates, sorted({*added} - {GOLDEN_NAME}))
    if SBOM_NAME in carried:
        text = (source.path / SBOM_NAME).read_text(encoding="utf-8")
        added[SBOM_NAME] = with_engine(text, entry).encode()
    folder = write_release(out, carried | added, info)
    try:
        verified = verify_release(folder)
        _compare(source, verified, frozenset(added))
        (check,) = selftest(verified, VIEW)
        if check.status != "ok":
            raise SelftestError(f"{folder}: {check.describe()}")
    except (IntegrityError, SelftestError):
        shutil.rmtree(folder)
        raise
    return verified


def _replaced(source: VerifiedRelease) -> set[str]:
    """Files of an engine that the source already has for another device, and of its golden vectors."""
    paths = [entry.path for entry in source.manifest.engines if entry.view == VIEW]
    stems = {path.removesuffix(".engine") for path in paths}
    return {
        file.path
        for file in source.files
        if file.path == REPORT_NAME
        or file.path.startswith(f"golden/{VIEW}/")
        or any(file.path in (f"{stem}.engine", f"{stem}.plan", f"{stem}.plan.json") for stem in stems)
    }


def _golden(source: VerifiedRelease, spec: BuildSpec, runner: Runner) -> dict[str, bytes]:
    """What the engine makes of the source's golden inputs, beside the vectors of the other engines."""
    golden = read_golden(source.path)
    pictures = [Picture(entry.origin, read_image(source.path, entry)) for entry in golden.inputs]
    files: dict[str, bytes] = {}
    entry = run_golden(files, VIEW, Subject(runner, spec.scheme), pictures, source.manifest.postprocessing)
    others: list[GoldenEngine] = [engine for engine in golden.engines if engine.view != VIEW]
    changed = golden.model_copy(update={"engines": (*others, entry)})
    return files | {GOLDEN_NAME: changed.to_text().encode()}


def _entry(
    source: VerifiedRelease, spec: BuildSpec, engine: Path, runner: Runner, record: BuildRecord, report: EvalReport
) -> EngineEntry:
    storage = next((entry.storage for entry in source.manifest.engines if entry.view == TENSORRT_GRAPH), None)
    told, here = report.to_json(), environment_fingerprint(())
    facts = {record.flavor: record.tensorrt, "gpu": record.gpu, "driver": record.driver}
    metrics = {key: told[key] for key in ("map50_95", "map50", "map75")}
    return EngineEntry(
        view=VIEW,
        path=f"{_FOLDER}/{engine.name}",
        format="tensorrt",
        scheme=spec.scheme,
        storage=storage,
        min_runtime_version=MINIMUM[record.flavor],
        digest=sha256_file(engine),
        size_bytes=engine.stat().st_size,
        validated_with={name: value for name, value in facts.items() if value} | {key: here[key] for key in _MACHINE},
        validated_on={"val": report.digests["data"]},
        raw_head=None if runner.head is None else RawHead(**asdict(runner.head)),
        metrics=metrics | {f"latency_ms_{key}": value for key, value in (report.latency_ms or {}).items()},
    )


def _info(
    source: VerifiedRelease,
    spec: BuildSpec,
    record: BuildRecord,
    entry: EngineEntry,
    gates: Sequence[GateResult],
    varying: Sequence[str],
) -> ReleaseInfo:
    manifest = source.manifest
    kept = [gate for gate in manifest.gates if VIEW not in (gate.view, gate.relative_to)]
    facts = {"gpu": record.gpu, "compute_capability": record.compute_capability, "driver": record.driver}
    environment = environment_fingerprint(_PACKAGES) | {name: value for name, value in facts.items() if value}
    known = {key: getattr(manifest, key) for key in ReleaseInfo.model_fields}
    step = LineageEntry(
        stage="device",
        key=sha256_json(["device", spec.model_dump(mode="json"), record.model_dump(mode="json")]),
        inputs={
            "release": source.digest,
            "graph": spec.onnx_sha256,
            "val": entry.validated_on["val"],
            **{f"{name} version": version for name, version in package_versions(("tensorrt", "tensorrt_rtx")).items()},
        },
        output=entry.digest,
    )
    return ReleaseInfo(
        **{
            **known,
            "created_with": CreatedWith(qyolo_deploy=__version__, environment=environment),
            "lineage": (*manifest.lineage, step),
            "engines": (*(engine for engine in manifest.engines if engine.view != VIEW), entry),
            "gates": (*kept, *(GateEntry(**gate.to_json()) for gate in gates)),
            "varying": tuple(dict.fromkeys((*manifest.varying, *varying))),
        }
    )


def _compare(source: VerifiedRelease, written: VerifiedRelease, added: frozenset[str]) -> None:
    """Makes sure that what was carried over is what was verified, however long the build took."""
    known = {file.path: file.sha256 for file in source.files}
    for file in written.files:
        if file.path not in added and known.get(file.path) != file.sha256:
            raise IntegrityError(f"{source.path / file.path} was changed while the engine was built.")
