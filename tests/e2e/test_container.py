"""The CPU image, built and run where that can be done without a Docker daemon.

QYOLO_CONTAINER_BUILD names a program for it: `build DOCKERFILE TAG CONTEXT` and
`run TAG [-v HOST:CONTAINER[:ro]]... -- COMMAND...`, with the image's user and environment; it may need root.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # the first build makes the base image

TAG = "qyolo-test:validate"
PROGRAM = os.environ.get("QYOLO_CONTAINER_BUILD", "")


@pytest.fixture(scope="module")
def image(repository):
    if not PROGRAM:
        pytest.skip("QYOLO_CONTAINER_BUILD names no program that builds and runs a Dockerfile")
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        pytest.skip("building an image without a Docker daemon needs root on Debian")
    if not shutil.which("unshare"):
        pytest.skip("unshare, which takes the network from the container, is not installed")
    dockerfile = repository / "docker" / "cpu.Dockerfile"
    built = subprocess.run([PROGRAM, "build", dockerfile, TAG, repository], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    return TAG


@pytest.fixture(scope="module")
def contained(image):
    """Function that runs a command in the image, without a network, with volumes that it cannot change."""

    def run(*command, **volumes):
        mounts = [word for name, folder in volumes.items() for word in ("-v", f"{folder}:/srv/{name}:ro")]
        line = ["unshare", "--net", PROGRAM, "run", image, *mounts, "--", *command]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    return run


def last_json(process):
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_the_accuracy_in_the_container_is_that_outside(contained, qyolo, tiny_build, engine):
    inside = Path("runs") / getattr(tiny_build, engine).relative_to(tiny_build.folder)
    process = contained("qyolo", "validate", inside, "--data", "runs/data", "--json", runs=tiny_build.folder)
    outside = qyolo("validate", getattr(tiny_build, engine), "--data", tiny_build.folder / "data", "--json")
    found, expected = last_json(process), outside.json
    assert found.pop("latency_ms").keys() == expected.pop("latency_ms").keys()
    assert found == expected
    assert found["images"] == 12


def test_a_release_has_its_accuracy_in_the_container(contained, tiny_build):
    folders = {name: tiny_build.folder / name for name in ("release", "data")}
    found = last_json(contained("qyolo", "validate", "release", "--data", "data", "--json", **folders))
    assert found["released"] == {key: found[key] for key in ("map50_95", "map50", "map75")}
    assert found["same_data"]


def test_the_exit_code_tells_the_health_of_a_release(contained, tiny_copy):
    release = tiny_copy.folder / "release"
    assert contained("qyolo", "verify", "release", release=release).returncode == 0
    with (release / "report.html").open("a") as file:
        file.write(" ")
    refused = contained("qyolo", "verify", "release", release=release)
    assert (refused.returncode, refused.stderr.count("report.html")) == (4, 1)
    assert contained("qyolo", "verify", "nowhere").returncode in (2, 4)


def test_doctor_finds_the_runtimes_and_nothing_of_the_build_side(contained):
    status = {
        found["component"]: found["status"] for found in last_json(contained("qyolo", "doctor", "--json"))["findings"]
    }
    assert {status[name] for name in ("onnxruntime", "openvino", "opencv-python", "faster-coco-eval")} == {"ok"}
    assert {status[name] for name in ("torch", "ultralytics", "onnx")} == {"missing"}


def test_nothing_but_temporary_folders_can_be_written(contained):
    """What this user cannot write is not missed where the root file system is read-only."""
    assert contained("id", "-u").stdout == "10001\n"
    elsewhere = "'(' -path /proc -o -path /dev -o -path /sys ')'"
    find = f"find / -xdev {elsewhere} -prune -o -writable -not -type l -print 2>/dev/null"
    writable = contained("sh", "-c", f"{find} || :")  # it may not look everywhere
    assert "/tmp" in writable.stdout.split()
    assert set(writable.stdout.split()) <= {"/tmp", "/var/tmp", "/run/lock"}, writable.stderr


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_validating_leaves_nothing_behind(contained, tiny_build, engine):
    engine = getattr(tiny_build, engine).relative_to(tiny_build.folder)
    find = "find /tmp /var/tmp /srv -user 10001 -type f -print"
    process = contained(
        "sh", "-c", f"qyolo validate runs/{engine} --data runs/data --quiet && {find}", runs=tiny_build.folder
    )
    assert (process.returncode, process.stdout) == (0, ""), process.stderr
