"""The light installation: what runs on a device or in a validating container, without anything of the build side."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qyolo_deploy

BUILD_SIDE = ("torch", "ultralytics", "onnx", "onnx_ir", "onnxsim", "jinja2", "matplotlib", "openvino")
# Everything else of the package belongs to the runtime side.
BUILD_MODULES = re.compile(r"qyolo_deploy\.(models|training|graph|qat|qc|export|stages\.|release\.(report|sbom)\b)")


def closure(requirements):
    """Distributions that a plain `pip install` of these brings, by what is installed here."""
    found, pending = {}, list(requirements)
    while pending:
        requirement = pending.pop()
        name = re.match(r"[\w.-]+", requirement)[0]
        if "extra ==" in requirement or name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another system or another Python
            continue
        pending += found[name].requires or ()
    return found


@pytest.fixture(scope="module")
def light(repository, tmp_path_factory):
    """Function that runs Python with the package and its plain dependencies installed, and nothing else."""
    site = tmp_path_factory.mktemp("light") / "site"
    site.mkdir()
    (site / "qyolo_deploy").symlink_to(Path(qyolo_deploy.__file__).parent)
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    for distribution in closure(project["dependencies"]).values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            (site / top).symlink_to(distribution.locate_file(top))
    home = tmp_path_factory.mktemp("home")

    def run(code, *arguments, **environment):
        # -S leaves out site-packages, so that the folder above is all there is.
        process = subprocess.run(
            [sys.executable, "-S", "-c", code, *map(str, arguments)],
            env={"PYTHONPATH": str(site), "HOME": str(home), "OMP_NUM_THREADS": "1", **environment},
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in process.stderr, process.stderr
        return process

    return run


@pytest.fixture(scope="module")
def light_qyolo(light):
    code = "import sys; from qyolo_deploy.cli import main; sys.argv[0] = 'qyolo'; main()"
    return lambda *arguments: light(code, *arguments)


def last_json(process):
    return json.loads(process.stdout.splitlines()[-1])


def test_the_light_environment_has_nothing_of_the_build_side(light):
    code = "import importlib.util as u, json; print(json.dumps([n for n in {} if u.find_spec(n)]))"
    assert last_json(light(code.format(BUILD_SIDE))) == []


def test_every_module_of_the_runtime_side_can_be_imported(light):
    code = (
        "import json, pkgutil, qyolo_deploy;"
        "found = pkgutil.walk_packages(qyolo_deploy.__path__, 'qyolo_deploy.', onerror=lambda name: None);"
        "print(json.dumps([module.name for module in found]))"
    )
    names = [name for name in last_json(light(code)) if not BUILD_MODULES.match(f"{name}.")]
    assert len(names) > 30
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print('[]')"
    assert last_json(light(code, *names)) == []


def test_public_names_of_the_runtime_side_are_there(light):
    code = "import json, qyolo_deploy as q; print(json.dumps([n for n in q.__all__ if getattr(q, n) is None]))"
    assert last_json(light(code)) == []
    code = "import sys, json, qyolo_deploy; print(json.dumps(sorted(n for n in sys.modules if n.startswith('qyolo'))))"
    assert last_json(light(code)) == ["qyolo_deploy", "qyolo_deploy._version"]


def test_validate_measures_the_same_accuracy_as_the_build(light_qyolo, tiny_build):
    process = light_qyolo("validate", tiny_build.onnx, "--data", tiny_build.folder / "data", "--json")
    assert process.returncode == 0, process.stderr
    (view,) = [view for view in tiny_build.report["views"] if view["name"] == "onnxruntime"]
    found = last_json(process)
    for key in ("map50_95", "map50", "map75", "per_class", "digests", "size_bytes", "thresholds"):
        assert found[key] == view[key]


def test_verify_and_recipes_work(light_qyolo, tiny_build):
    process = light_qyolo("verify", tiny_build.folder / "release", "--json")
    assert process.returncode == 0, process.stderr
    assert last_json(process)["name"] == "quickstart"
    assert light_qyolo("release", "schema").returncode == 0
    shown = light_qyolo("recipe", "show", tiny_build.folder / "release" / "recipe.resolved.yaml")
    assert shown.stdout == (tiny_build.folder / "recipe.resolved.yaml").read_text()
    assert light_qyolo("recipe", "schema").returncode == 0


def test_verify_loads_no_runtime(light, tiny_build):
    """It is to be quick on a device, and to say something where the runtime itself is broken."""
    code = (
        "import json, sys; from qyolo_deploy.cli import app; app(standalone_mode=False);"
        "print(json.dumps([name for name in ('numpy', 'cv2', 'onnxruntime') if name in sys.modules]))"
    )
    process = light(code, "verify", tiny_build.folder / "release")
    assert process.stdout.startswith("quickstart 1.0.0: ")
    assert last_json(process) == []


def test_engines_are_compared_by_their_speed(light_qyolo, tiny_build):
    arguments = ("--imgsz", "128", "--rounds", "2", "--runs", "1", "--json")
    process = light_qyolo("bench", "engines", tiny_build.onnx, *arguments)
    assert process.returncode == 0, process.stderr
    assert [row["name"] for row in last_json(process)["rows"]] == [tiny_build.onnx.name]


def test_a_release_proves_itself(light_qyolo, tiny_build):
    release = tiny_build.folder / "release"
    process = light_qyolo("selftest", release, "--json")
    assert process.returncode == 0, process.stderr
    checks = {check["view"]: check for check in last_json(process)["engines"]}
    assert {view: check["status"] for view, check in checks.items()} == {
        "float": "ok",
        "onnxruntime": "ok",
        "openvino": "not run",
    }
    assert checks["onnxruntime"]["difference"] == {"relative_error": 0, "score": 0, "iou": 1}
    assert checks["onnxruntime"]["detections"] > 0
    process = light_qyolo("selftest", release, "--engine", "openvino", "--json")
    assert process.returncode == 3
    assert last_json(process)["error"] == "OpenVINO is not installed"


def test_a_release_is_validated_by_its_manifest(light_qyolo, tiny_build):
    release, data = tiny_build.folder / "release", tiny_build.folder / "data"
    process = light_qyolo("validate", release, "--data", data, "--json")
    assert process.returncode == 0, process.stderr
    found = last_json(process)
    assert found["same_data"] and found["name"] == "onnxruntime"
    assert found["released"] == {key: found[key] for key in ("map50_95", "map50", "map75")}
    refused = light_qyolo("validate", release, "--data", data, "--conf", "0.2", "--json")
    assert (refused.returncode, last_json(refused)["error"][:7]) == (2, "--conf:")


def test_signatures_and_archives_name_the_missing_package(light_qyolo, tiny_build, tmp_path):
    release = tiny_build.folder / "release"
    for package, extra, arguments in (
        ("cryptography", "sign", ("verify", release, "--key", tmp_path / "public.pem")),
        ("zstandard", "bundle", ("release", "pack", release, "--out", tmp_path / "release.tar.zst")),
    ):
        process = light_qyolo(*arguments, "--json")
        assert process.returncode == 3
        assert f"'{package}'" in last_json(process)["error"]
        assert last_json(process)["hint"] == f'pip install "qyolo_deploy[{extra}]"'
    assert list(tmp_path.iterdir()) == []


def test_the_quantized_model_is_readable(light, tiny_build):
    code = (
        "import json, sys; from pathlib import Path; from qyolo_deploy import QuantizedModel;"
        "model = QuantizedModel.load(Path(sys.argv[1])); print(json.dumps([model.scheme, sorted(model.lineage)]))"
    )
    process = light(code, tiny_build.folder / "release" / "model.safetensors")
    assert last_json(process) == ["w4a8", ["data", "float", "train"]]


def test_a_finished_build_is_known_to_be_finished(light_qyolo, tiny_copy):
    process = light_qyolo(*tiny_copy.arguments(), "--out", tiny_copy.out, "--json", "--until", "correct")
    assert process.returncode == 0, process.stderr
    assert last_json(process)["ran"] == []


def test_a_build_names_the_missing_package_and_how_to_get_it(light_qyolo, tiny_build, tmp_path):
    process = light_qyolo(*tiny_build.arguments("export.targets=[onnxruntime]"), "--out", tmp_path, "--json")
    assert process.returncode == 3
    assert "error: stage float: the package 'torch' is not installed\n" in process.stderr
    assert last_json(process)["hint"] == 'pip install "qyolo_deploy[build]"'


def test_an_openvino_engine_names_the_missing_runtime(light_qyolo, tiny_build):
    process = light_qyolo("validate", tiny_build.openvino, "--data", tiny_build.folder / "data", "--json")
    assert process.returncode == 3
    assert "error: OpenVINO is not installed" in process.stderr
    assert last_json(process)["hint"] == 'pip install "qyolo_deploy[openvino]"'


def test_doctor_tells_what_is_missing_and_how_to_get_it(light_qyolo):
    process = light_qyolo("doctor", "--json")
    assert process.returncode == 0
    found = {finding["component"]: finding for finding in last_json(process)["findings"]}
    for component in ("onnxruntime", "faster-coco-eval", "pycocotools", "opencv-python"):
        assert (found[component]["status"], found[component]["remedy"]) == ("ok", "")
    for component in ("torch", "ultralytics", "onnx", "onnx-ir", "onnxsim", "jinja2"):
        assert (found[component]["status"], found[component]["version"]) == ("missing", "")
        assert found[component]["remedy"] == 'pip install "qyolo_deploy[build]"'
    assert found["openvino"]["status"] == "missing"
    assert found["openvino"]["remedy"] == 'pip install "qyolo_deploy[openvino]"'
    assert 'pip install "qyolo_deploy[build]"' in process.stdout


def test_doctor_tells_a_broken_installation_from_a_missing_one():
    code = (
        "import json, sys; sys.modules['openvino'] = None; from qyolo_deploy import check_runtimes;"
        "print(json.dumps({found.component: [found.status, found.remedy] for found in check_runtimes()}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert last_json(process)["openvino"] == ["broken", 'reinstall: pip install "qyolo_deploy[openvino]"']


def test_doctor_looks_for_every_package_of_the_build_side(repository):
    from qyolo_deploy.doctor import check_runtimes

    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", requirement)[0] for requirement in project["optional-dependencies"]["build"]}
    assert needed <= {found.component for found in check_runtimes()}


def test_nothing_is_reported_or_written_behind_the_users_back(light, tmp_path):
    """ONNX Runtime would leave a device id under HOME and a session in the folder of temporary files."""
    code = "import qyolo_deploy.engines.onnxruntime; print('[]')"
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    assert last_json(light(code, HOME=str(home), TMPDIR=str(scratch))) == []
    assert [*home.rglob("*"), *scratch.rglob("*")] == []


@pytest.mark.parametrize(("command", "package"), [("compare", "onnx"), ("sensitivity", "torch")])
def test_looking_inside_names_the_missing_package(command, package, light_qyolo, tiny_build):
    views = [tiny_build.onnx] * 2 if command == "compare" else [tiny_build.folder]
    process = light_qyolo(command, *views, "--data", tiny_build.folder / "data", "--json")
    assert process.returncode == 3
    assert f"needs the package '{package}', which is not installed" in process.stderr
    assert last_json(process)["hint"] == 'pip install "qyolo_deploy[build]"'
