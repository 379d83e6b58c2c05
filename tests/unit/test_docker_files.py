"""Images, services and pipelines as text: what linters and schemas say, and what their scripts do."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from qyolo_deploy.engines.requirements import MINIMUM

DOCKERFILES = ("cpu.Dockerfile", "tensorrt.Dockerfile")


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "docker"


def read_yaml(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(folder, name):
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed; .[dev] brings it")
    linted = subprocess.run(["hadolint", "--no-color", folder / name], capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stdout) == (0, "")


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("compose.yaml", "compose-spec"),
        ("github-action/action.yml", "github-actions"),
        ("gitlab-ci.yml", "gitlab-ci"),
    ],
)
def test_files_follow_their_published_schema(folder, name, schema):
    if not shutil.which("check-jsonschema"):
        pytest.skip("check-jsonschema is not installed; .[dev] brings it")
    line = ["check-jsonschema", "--builtin-schema", f"vendor.{schema}", folder / name]
    if schema == "gitlab-ci":
        line += ["--data-transform", "gitlab-ci"]
    checked = subprocess.run(line, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_and_run_as_nobody_in_particular(folder, name):
    text = (folder / name).read_text(encoding="utf-8")
    bases = re.findall(r"^ARG (?:PYTHON|TENSORRT)=(\S+)", text, re.M)
    assert bases and all(re.search(r":\d[\w.-]*$", base) for base in bases)
    stages = {}
    for stage in re.split(r"^FROM ", text, flags=re.M)[1:]:
        stages[re.match(r"\S+ AS (\S+)", stage)[1]] = stage
    for target in {"cpu.Dockerfile": ("build", "validate"), "tensorrt.Dockerfile": ("tensorrt",)}[name]:
        assert re.findall(r"^USER (\S+)", stages[target], re.M)[-1] == "10001:10001"
    assert list(stages)[-1] in ("validate", "tensorrt")  # what is built without --target
    assert 'ENTRYPOINT ["qyolo"]' in text


def test_the_build_image_takes_the_torch_that_the_package_asks_for(repository, folder):
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = [requirement for requirement in extras["build"] if requirement.startswith("torch>")]
    assert f'ARG TORCH="{wanted}"' in (folder / "cpu.Dockerfile").read_text()
    assert any(requirement.startswith(f"openvino>={MINIMUM['openvino']}") for requirement in extras["openvino"])


@pytest.mark.parametrize("service", ["validate", "build"])
def test_services_are_locked_down(folder, service):
    found = read_yaml(folder / "compose.yaml")["services"][service]
    assert found["read_only"] is True
    assert (found["network_mode"], found["cap_drop"]) == ("none", ["ALL"])
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert found["user"].startswith("${USER_ID:-10001}")
    assert found["tmpfs"][0].startswith("/tmp:")
    assert found["build"]["target"] == service
    writable = [volume["target"] for volume in found["volumes"] if not volume.get("read_only")]
    assert writable == (["/srv/runs"] if service == "build" else [])


def test_only_what_an_image_is_made_of_is_sent_to_the_builder(repository):
    lines = (repository / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", (repository / "docker/cpu.Dockerfile").read_text(), re.M))
    needed = {word for words in copied for word in words.split()}
    assert {f"!{name}" for name in needed} == {line for line in lines if line.startswith("!")}


# --- scripts of the pipelines, run as their runners would --------------------------------------------------------


@pytest.fixture
def command(qyolo, tmp_path):
    """Environment of a runner, with `qyolo` and `python` on its path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    code = "import sys; from qyolo_deploy.cli import main; sys.argv[0] = 'qyolo'; main()"
    (programs / "qyolo").write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    (programs / "qyolo").chmod(0o755)
    environment = qyolo.environment(PATH=f"{programs}:{os.environ['PATH']}")
    return environment | {"RUNNER_TEMP": str(tmp_path), "GITHUB_OUTPUT": str(tmp_path / "output")}


def run_step(folder, environment, name, **inputs):
    """A step of the action, as its runner calls bash; its exit code and outputs."""
    (step,) = [
        step for step in read_yaml(folder / "github-action/action.yml")["runs"]["steps"] if step.get("name") == name
    ]
    assert set(inputs) == set(step["env"])
    line = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(line, env=environment | inputs, capture_output=True, text=True, check=False)
    output = Path(environment["GITHUB_OUTPUT"])
    lines = output.read_text().splitlines() if output.exists() else []
    return done.returncode, dict(line.split("=", 1) for line in lines)


def test_no_input_of_the_action_is_pasted_into_a_script(folder):
    action = read_yaml(folder / "github-action/action.yml")
    scripts = [step["run"] for step in action["runs"]["steps"] if "run" in step]
    assert len(scripts) == 4
    assert not any("${{" in script for script in scripts)


def test_the_action_verifies_and_validates(folder, command, tiny_build):
    release = str(tiny_build.folder / "release")
    code, outputs = run_step(folder, command, "Verify", RELEASE=release)
    assert (code, json.loads(outputs["result"])["name"]) == (0, "quickstart")
    data = str(tiny_build.folder / "data")
    code, outputs = run_step(folder, command, "Validate", ENGINE=str(tiny_build.onnx), DATA=data)
    (view,) = [view for view in tiny_build.report["views"] if view["name"] == "onnxruntime"]
    assert (code, json.loads(outputs["result"])["map50_95"]) == (0, view["map50_95"])


def test_the_action_builds_and_fails_with_its_command(folder, command, tiny_build, tmp_path):
    inputs = {"SETTINGS": "\n".join((*tiny_build.settings, "")), "OUT": str(tiny_build.out), "DATA": ""}
    code, outputs = run_step(folder, command, "Build", RECIPE=str(tiny_build.recipe), **inputs)
    assert (code, outputs["folder"]) == (0, str(tiny_build.folder))
    assert json.loads(outputs["result"])["ran"] == []
    assert run_step(folder, command, "Verify", RELEASE=str(tmp_path / "nowhere"))[0] in (2, 4)
    assert run_step(folder, command, "Build", RECIPE="$(touch x)", **inputs)[0] == 2


def run_job(folder, environment, name, cwd, **variables):
    lines = read_yaml(folder / "gitlab-ci.yml")[name]["script"]
    done = subprocess.run(
        ["sh", "-ec", "\n".join(lines)],
        env=environment | variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_the_gitlab_jobs_do_what_they_say(folder, command, tiny_build, tiny_copy, tmp_path):
    data, engine = str(tiny_build.folder / "data"), str(tiny_build.onnx)
    assert run_job(folder, command, ".qyolo-verify", tmp_path, RELEASE=str(tiny_build.folder / "release"))[0] == 0
    assert run_job(folder, command, ".qyolo-validate", tmp_path, ENGINE=engine, DATA=data)[0] == 0
    assert json.loads((tmp_path / "validate.json").read_text())["images"] == 12
    assert run_job(folder, command, ".qyolo-validate", tmp_path, ENGINE="none.onnx", DATA=data)[0] == 2
    (tmp_path / "runs").symlink_to(tiny_copy.out)
    settings = {"RECIPE": str(tiny_build.recipe), "SETTINGS": "train.epochs=-1"}
    assert run_job(folder, command, ".qyolo-build", tmp_path, **settings)[0] == 2
