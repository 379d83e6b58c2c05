"""A release that is finished on its device, by a TensorRT that ONNX Runtime stands in for; no GPU is needed."""

import json
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from helpers.releases import IMGSZ, make_dataset, make_info, make_release, write_detector

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.console import Reporter
from qyolo_deploy.engines import tensorrt as tensorrt_module
from qyolo_deploy.engines.onnxruntime import OnnxRuntimeRunner
from qyolo_deploy.engines.tensorrt_build import BuiltPlan
from qyolo_deploy.engines.tensorrt_file import BuildRecord, read_engine
from qyolo_deploy.engines.tensorrt_runtime import Device, TensorRt
from qyolo_deploy.engines.tensorrt_spec import BuildSpec
from qyolo_deploy.errors import InputError, IntegrityError, SelftestError
from qyolo_deploy.recipe import Gate, TensorRtSection, ValidateSection
from qyolo_deploy.release.golden import read_golden
from qyolo_deploy.release.sbom import sbom_text
from qyolo_deploy.release.sbom_engine import with_engine
from qyolo_deploy.release.verify import verify_release
from qyolo_deploy.stages import device
from qyolo_deploy.validate.run import validate

ORIN = Device("Orin", "8.7", "CUDA 12.6")
GRAPH, SPEC = "engines/tensorrt/toy_w4a8.onnx", "engines/tensorrt/build.json"
PASSING = Gate(view="tensorrt", metric="map50_95", op=">=", bound=0.0, at="device")


class StandIn(OnnxRuntimeRunner):
    """Runs the plan that the stand-in of the builder made, which is the graph itself."""

    noise = 0.0

    def __init__(self, path, conf=0.001):
        plan = path.with_name(f".{path.stem}.onnx")
        plan.write_bytes(read_engine(path)[2])
        super().__init__(plan, conf)
        plan.unlink()
        self.path, self.runtime = path, "tensorrt"

    def outputs(self, images):
        rng = np.random.default_rng()
        return {name: value + np.float32(self.noise * rng.random()) for name, value in super().outputs(images).items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture
def make_source(tmp_path):
    """Function from gates to a release that a device can build from."""

    def make(*gates, more=None, **changes):
        graph = write_detector(tmp_path / "graph.onnx")
        spec = BuildSpec(
            name="toy_w4a8",
            scheme="w4a8",
            onnx="toy_w4a8.onnx",
            onnx_sha256=sha256_file(graph),
            input="images",
            shapes=None,
            imgsz=IMGSZ,
            options=TensorRtSection(),
            metadata={"imgsz": [IMGSZ, IMGSZ], "names": {0: "dark", 1: "bright"}},
            validation=ValidateSection(rect=False, latency_runs=2),
            gates=gates,
        )
        files = {GRAPH: graph, SPEC: spec.to_text().encode(), **(more or {})}
        return make_release(tmp_path / "source", more=files, **changes)

    return make


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """A GPU and a TensorRT; `changes` is called while it builds."""
    changes = []

    def build(runtime, folder, spec, tick, kept=None):
        for change in changes:
            change()
        record = BuildRecord(
            flavor=runtime.flavor,
            tensorrt=runtime.version,
            gpu=ORIN.name,
            compute_capability=ORIN.compute_capability,
            driver=ORIN.driver,
            onnx_sha256=spec.onnx_sha256,
            weights_bytes=1000,
            hardware_compatibility="none",
            version_compatible=False,
        )
        return BuiltPlan((folder / spec.onnx).read_bytes(), record)

    monkeypatch.setattr(device, "import_tensorrt", lambda flavor: TensorRt(None, "tensorrt", "10.3.0"))
    monkeypatch.setattr(device, "find_device", lambda: ORIN)
    monkeypatch.setattr(device, "build_plan", build)
    monkeypatch.setattr(tensorrt_module, "TensorRtRunner", StandIn)
    return changes


def finish(source, data, out, key=None):
    return device.build_on_device(
        source, None if data is None else str(data / "two.yaml"), out, None, Reporter(True), key
    )


# --- what is released ---------------------------------------------------------------------------------------


def test_the_release_holds_the_engine_its_proof_and_where_both_come_from(make_source, data, tmp_path):
    source = make_source(PASSING)
    before = verify_release(source)
    result = finish(source, data, tmp_path / "out")
    assert result.release == tmp_path / "out" / "release"
    after, manifest = verify_release(result.release), before.manifest
    assert verify_release(source).digest == before.digest  # which is as it was

    engine = next(entry for entry in after.manifest.engines if entry.view == "tensorrt")
    measured = validate(tmp_path / "graph.onnx", data / "two.yaml", IMGSZ)  # the same network on its own
    assert engine.metrics["map50_95"] == measured.metrics.map50_95
    assert engine.digest == sha256_file(result.release / engine.path) == sha256_file(result.engine)
    assert (engine.validated_with["tensorrt"], engine.validated_with["gpu"]) == ("10.3.0", "Orin")
    assert engine.validated_on == {"val": measured.digests["data"]}
    assert [entry for entry in after.manifest.engines if entry.view != "tensorrt"] == list(manifest.engines)

    carried = {file.path: file.sha256 for file in before.files}
    written = {file.path: file.sha256 for file in after.files}
    assert {path: written[path] for path in carried if path != "golden/golden.json"} == {
        path: digest for path, digest in carried.items() if path != "golden/golden.json"
    }
    added = {path for path in written if path not in carried and not path.startswith("golden/")}
    assert added == {f"engines/tensorrt/toy_w4a8{end}" for end in (".engine", ".plan", ".plan.json")} | {
        "tensorrt_report.json"
    }
    (step,) = after.manifest.lineage
    assert step.stage == "device" and step.inputs["release"] == before.digest and step.output == engine.digest
    (gate,) = after.manifest.gates
    assert (gate.view, gate.passed, gate.observed) == ("tensorrt", True, measured.metrics.map50_95)
    assert {entry.view for entry in read_golden(result.release).engines} == {"onnxruntime", "tensorrt"}
    told = json.loads((result.release / "tensorrt_report.json").read_text())
    assert told["engine"] == "toy_w4a8.engine" and str(tmp_path) not in json.dumps(told)
    assert told["views"][0]["map50_95"] == measured.metrics.map50_95


def test_it_lies_beside_the_source_by_default_and_is_signed_where_asked(make_source, data, tmp_path):
    private = ed25519.Ed25519PrivateKey.generate()
    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key.write_bytes(private.private_bytes(*form))
    public.write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    result = finish(make_source(), data, None, key)
    assert result.release == tmp_path / "source" / "release-tensorrt" / "release"
    assert verify_release(result.release, public).signature == "valid"


def test_a_release_of_one_device_is_the_source_of_the_next(make_source, data, tmp_path):
    first = finish(make_source(PASSING), data, tmp_path / "first").release
    second = finish(first, data, tmp_path / "second").release
    manifest = verify_release(second).manifest
    assert [entry.view for entry in manifest.engines] == ["onnxruntime", "tensorrt"]
    assert [step.inputs["release"] for step in manifest.lineage][1] == verify_release(first).digest
    assert len(manifest.gates) == 1 and len(read_golden(second).engines) == 2


def test_the_bill_of_materials_names_the_engine(tmp_path):
    (entry,) = make_info("0" * 64).engines
    model = tmp_path / "model.safetensors"
    model.write_bytes(bytes(40))
    text = sbom_text(make_info("0" * 64), {"model.safetensors": model})
    changes = {"view": "tensorrt", "path": "engines/tensorrt/toy.engine", "digest": "d" * 64}
    added = with_engine(text, entry.model_copy(update=changes))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(added) is None
    parts = {part["bom-ref"]: part for part in json.loads(added)["components"]}
    assert set(parts) == {part["bom-ref"] for part in json.loads(text)["components"]} | {"engine:tensorrt"}
    assert {"name": "qyolo:digest", "value": "d" * 64} in parts["engine:tensorrt"]["properties"]
    assert json.loads(added)["serialNumber"] != json.loads(text)["serialNumber"]
    assert with_engine(added, entry.model_copy(update=changes)).count('"bom-ref": "engine:tensorrt"') == 1
    with pytest.raises(IntegrityError, match="no bill of materials"):
        with_engine("{}", entry)


# --- what is not --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SPEC, GRAPH, "recipe.yaml"])
def test_a_source_that_was_altered_is_refused_and_nothing_is_left(
    make_source, data, tmp_path, monkeypatch, capsys, name
):
    from qyolo_deploy import cli

    source, out = make_source(PASSING), tmp_path / "out"
    altered = bytearray((source / name).read_bytes())
    altered[-2] ^= 1
    (source / name).write_bytes(altered)
    arguments = ["qyolo", "engine", "build", str(source), "--data", str(data / "two.yaml"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 4
    assert name in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(IntegrityError, match=name):  # however it is named
        finish(source / "engines" / "tensorrt" / "build.json", data, out)


def test_a_source_that_is_altered_during_the_build_is_refused(make_source, data, tmp_path, stand_in):
    source = make_source()
    stand_in.append(lambda: (source / "recipe.yaml").write_text("name: toy \n"))
    with pytest.raises((IntegrityError, InputError), match=r"recipe"):
        finish(source, data, tmp_path / "out")
    assert not (tmp_path / "out" / "release").exists()


def test_another_engine_of_the_source_that_is_altered_during_the_build_too(make_source, data, tmp_path, stand_in):
    source = make_source()
    stand_in.append(lambda: (source / "engines" / "onnxruntime" / "toy.onnx").write_bytes(b"another"))
    with pytest.raises(IntegrityError, match=r"toy\.onnx was changed while the engine was built"):
        finish(source, data, tmp_path / "out")
    assert not (tmp_path / "out" / "release").exists()


def test_a_failed_gate_leaves_the_engine_and_no_release(make_source, data, tmp_path):
    out = tmp_path / "out"
    assert finish(make_source(), data, out).release.is_dir()
    failing = PASSING.model_copy(update={"bound": 0.99})
    result = finish(make_source(failing), data, out)
    assert not result.passed and result.release is None
    assert result.engine.is_file() and not (out / "release").exists()
    assert not json.loads((out / "tensorrt_report.json").read_text())["passed"]


def test_what_was_not_measured_is_not_released(make_source, tmp_path):
    result = finish(make_source(PASSING), None, tmp_path / "out")
    assert (result.release, result.report) == (None, None)
    assert result.engine.is_file() and not (tmp_path / "out" / "release").exists()


def test_an_engine_that_does_not_repeat_itself_is_not_released(make_source, data, tmp_path, monkeypatch):
    monkeypatch.setattr(StandIn, "noise", 1.0)
    with pytest.raises(SelftestError, match="tensorrt differs"):
        finish(make_source(), data, tmp_path / "out")
    assert not (tmp_path / "out" / "release").exists()


@pytest.mark.parametrize("place", [".", "engines", ".."])
def test_the_source_is_never_written_over(make_source, data, place):
    source = make_source()
    with pytest.raises(InputError, match=r"--out .*: expected a place beside"):
        finish(source, data, source / place)
    verify_release(source)
