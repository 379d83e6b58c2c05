"""Engine files: a plan, the header that ultralytics reads, and the record of where it was built.

A plan runs with the TensorRT that built it, on the GPU that it was built for, and says little when it does not. So each
file is written with a record, which is compared before the plan is loaded.
"""

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.engines.requirements import version_numbers
from qyolo_deploy.engines.tensorrt_runtime import Device, Flavor
from qyolo_deploy.errors import InputError, RuntimeMissingError
from qyolo_deploy.strict import Sha256, Strict, validation_message

RECORD_SUFFIX = ".plan.json"
_RECORD_KEY = "qyolo_build"
_LENGTH_BYTES = 4
_LONGEST_HEADER = 1 << 20
SCHEMA_VERSION: Final = 1


class BuildRecord(Strict):
    """Where and from what a plan was built.

    Attributes:
        schema_version: Of the record.
        flavor: TensorRT or TensorRT-RTX.
        tensorrt: Its version.
        gpu: Name of the GPU; None where none was needed.
        compute_capability: Of the GPU.
        driver: The newest CUDA that its driver runs.
        onnx_sha256: Digest of the graph.
        weights_bytes: What the weights take in the plan, as the builder says.
        hardware_compatibility: Other GPUs that it was built for.
        version_compatible: Whether later minor versions load it.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    flavor: Flavor
    tensorrt: str
    gpu: str | None
    compute_capability: str | None
    driver: str | None
    onnx_sha256: Sha256
    weights_bytes: int | None
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"]
    version_compatible: bool


def write_engine(folder: Path, name: str, plan: bytes, metadata: dict[str, Any], record: BuildRecord) -> list[Path]:
    """Writes `<name>.engine` with the header, `<name>.plan` without, which trtexec and Triton want, and the record.

    Args:
        folder: Where to.
        name: Stem of the files.
        plan: The serialized engine.
        metadata: For readers of the header.
        record: Where it was built.

    Returns:
        The three paths, the `.engine` first.
    """
    header = json.dumps(metadata | {_RECORD_KEY: record.model_dump(mode="json")}).encode()
    paths = [folder / f"{name}.engine", folder / f"{name}.plan", folder / f"{name}{RECORD_SUFFIX}"]
    write_atomic(paths[0], len(header).to_bytes(_LENGTH_BYTES, "little") + header + plan)
    write_atomic(paths[1], plan)
    write_atomic(paths[2], record.model_dump_json(indent=1) + "\n")
    return paths


def read_engine(path: Path) -> tuple[dict[str, Any], BuildRecord | None, bytes]:
    """Reads an engine file, our own or one of ultralytics or trtexec.

    Args:
        path: An `.engine` with or without the header, or a `.plan`.

    Returns:
        Metadata (empty where there is none), the record if there is one, and the plan.

    Raises:
        InputError: If the file is empty, or metadata or record are not valid.
    """
    data = path.read_bytes()
    if not data:
        raise InputError(f"{path}: empty")
    metadata, plan = _split(data)
    record = metadata.pop(_RECORD_KEY, None)
    beside = path.with_name(f"{path.stem}{RECORD_SUFFIX}")
    if record is None and path.suffix == ".plan" and beside.is_file():
        text = beside.read_text(encoding="utf-8", errors="replace")
        return metadata, _record(text, beside), plan
    return metadata, None if record is None else _record(json.dumps(record), path), plan


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Metadata and plan; a file that does not begin with JSON of the length that it says is all plan."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header, plan = data[_LENGTH_BYTES : _LENGTH_BYTES + length], data[_LENGTH_BYTES + length :]
    if not 2 <= length <= _LONGEST_HEADER or not plan:
        return {}, data
    try:
        metadata = json.loads(header)
    except ValueError:
        return {}, data
    return (metadata, plan) if isinstance(metadata, dict) else ({}, data)


def _record(text: str, source: Path) -> BuildRecord:
    try:
        return BuildRecord.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{source}: the record of the build is not valid: {validation_message(error)}") from error


def check_record(path: Path, record: BuildRecord, version: str, device: Device) -> None:
    """Makes sure that a plan can run here, before TensorRT is asked.

    Args:
        path: What errors name.
        record: Of the plan.
        version: Of the TensorRT of the record's flavor that is installed.
        device: The GPU.

    Raises:
        RuntimeMissingError: If version or GPU are not those that it was built for; it tells both.
    """
    reasons = differences(record, version, device)
    if reasons:
        raise RuntimeMissingError(
            f"{path}: {'; '.join(reasons)}",
            hint="`qyolo engine build` builds it for this device from its build.json.",
        )


def differences(record: BuildRecord, version: str, device: Device) -> list[str]:
    """What keeps a plan from running, one clause each."""
    reasons = []
    if not _version_fits(record, version):
        reasons.append(f"built with TensorRT {record.tensorrt}, but {version} is installed")
    if not _capability_fits(record, device):
        reasons.append(
            f"built for {record.gpu} (compute capability {record.compute_capability}), "
            f"but this is {device.name} ({device.compute_capability})"
        )
    return reasons


def _version_fits(record: BuildRecord, version: str) -> bool:
    built, here = version_numbers(record.tensorrt), version_numbers(version)
    if record.version_compatible:
        return built[0] == here[0] and built <= here
    return built[:3] == here[:3]


def _capability_fits(record: BuildRecord, device: Device) -> bool:
    if record.compute_capability is None or record.flavor == "tensorrt_rtx":
        return True  # TensorRT-RTX chooses its kernels where it runs
    if record.hardware_compatibility == "ampere_plus":
        return version_numbers(device.compute_capability) >= (8,)
    return record.compute_capability == device.compute_capability
