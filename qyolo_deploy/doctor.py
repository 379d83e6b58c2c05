"""What this machine can build and run, what is missing, and how to get it."""

import importlib.metadata
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from qyolo_deploy._version import __version__
from qyolo_deploy.artifact import cpu_abilities, saturates_products
from qyolo_deploy.engines.requirements import MINIMUM, version_numbers
from qyolo_deploy.engines.tensorrt_runtime import Flavor, find_device, import_tensorrt
from qyolo_deploy.errors import RuntimeMissingError

Status = Literal["ok", "missing", "too old", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Args:
        component: What was looked for.
        status: Whether it is usable.
        version: Its version, if it is there.
        details: Devices and abilities.
        remedy: How to get it.
        needed_for: What does not work without it.
    """

    component: str
    status: Status
    version: str
    details: str
    remedy: str
    needed_for: str


@dataclass(frozen=True)
class _Package:
    name: str
    minimum: str
    extra: str
    needed_for: str
    details: Callable[[], str] = lambda: ""
    remedy: str | None = None


def check_runtimes() -> list[Finding]:
    """Looks for runtimes, build packages and devices; nothing is changed, torch is not imported."""
    return [_python(), _cpu(), *(_package(entry) for entry in _PACKAGES), _compiler()]


def _python() -> Finding:
    system = f"{platform.system()} {platform.machine()}"
    return Finding("python", "ok", platform.python_version(), f"qyolo_deploy {__version__}, {system}", "", "all")


def _cpu() -> Finding:
    told = ", ".join(cpu_abilities()) or "abilities unknown"
    if saturates_products():
        told += ", no VNNI: needs reduce_range"
    return Finding("cpu", "ok", "", told, "", "int8 speed")


def _package(entry: _Package) -> Finding:
    extra = f"[{entry.extra}]" if entry.extra else ""
    remedy = entry.remedy or f'pip install "qyolo_deploy{extra}"'
    try:
        version = importlib.metadata.version(entry.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(entry.name, "missing", "", "", remedy, entry.needed_for)
    if version_numbers(version) < version_numbers(entry.minimum):
        return Finding(entry.name, "too old", version, f"at least {entry.minimum}", remedy, entry.needed_for)
    try:
        details = entry.details()
    except (
        ImportError,
        OSError,
        RuntimeError,
        RuntimeMissingError,
    ) as error:  # installed, but a library below it is not there or broken
        reason = " ".join(str(error).split())
        return Finding(entry.name, "broken", version, reason, f"reinstall: {remedy}", entry.needed_for)
    return Finding(entry.name, "ok", version, details, "", entry.needed_for)


def _onnxruntime_devices() -> str:
    import onnxruntime

    return ", ".join(onnxruntime.get_available_providers())


def _openvino_devices() -> str:
    import openvino

    core = openvino.Core()
    abilities = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return f"{', '.join(core.available_devices)} ({abilities})"


def _tensorrt_details(flavor: Flavor) -> str:
    found, device = import_tensorrt(flavor), find_device()
    if device is not None:
        return f"{device.name} (compute capability {device.compute_capability}, {device.driver})"
    return "no GPU: builds, does not run" if found.is_rtx else "no GPU: neither builds nor runs"


def _compiler() -> Finding:
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), "")
    status: Status = "ok" if found else "missing"
    remedy = "" if found else "install g++ or clang"
    return Finding("C++ compiler", status, "", found, remedy, "fast training (it works without, slower)")


_PACKAGES = (
    _Package("onnxruntime", MINIMUM["onnxruntime"], "", "running ONNX engines", _onnxruntime_devices),
    _Package("openvino", MINIMUM["openvino"], "openvino", "building and running OpenVINO engines", _openvino_devices),
    _Package(
        "tensorrt",
        MINIMUM["tensorrt"],
        "tensorrt",
        "building and running TensorRT engines",
        partial(_tensorrt_details, "tensorrt"),
        'pip install "qyolo_deploy[tensorrt]"; on Jetson, JetPack brings it',
    ),
    _Package(
        "tensorrt_rtx",
        MINIMUM["tensorrt_rtx"],
        "tensorrt-rtx",
        "building TensorRT-RTX engines, also without a GPU",
        partial(_tensorrt_details, "tensorrt_rtx"),
    ),
    _Package("faster-coco-eval", "1.7", "", "mAP"),
    _Package("pycocotools", "2.0.8", "", "mAP by the reference"),
    _Package("opencv-python", "4.11", "", "reading images"),
    _Package("torch", "2.12", "build", "training and export"),
    _Package("ultralytics", "8.4.190", "build", "training and export"),
    _Package("onnx", "1.20", "build", "export"),
    _Package("onnx-ir", "0.1.13", "build", "export"),
    _Package("onnxsim", "0.4.36", "build", "export"),
    _Package("jinja2", "3.1", "build", "the HTML report"),
    _Package("cyclonedx-python-lib", "9", "build", "the bill of materials of a release"),
    _Package("cryptography", "43", "sign", "signing releases and checking signatures"),
    _Package("zstandard", "0.23", "bundle", "packing and unpacking releases"),
    _Package("matplotlib", "3.9", "build", "charts of the HTML report"),
)
