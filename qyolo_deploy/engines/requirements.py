"""Which runtimes engines are built for and proven on, asked before any work begins."""

import importlib.metadata
from collections.abc import Mapping

from qyolo_deploy.errors import RuntimeMissingError

# What the package itself requires; older runtimes may load some engines, but none was tried. ONNX Runtime folds 4-bit
# weights into its int8 kernels from 1.23 on.
MINIMUM = {"onnxruntime": "1.23", "openvino": "2026.0", "tensorrt": "10.0", "tensorrt_rtx": "1.0"}
# Of what came later: ONNX Runtime knows integers of 2 bits from 1.24 on.
_MINIMUM_OF_STORAGE = {("onnxruntime", "int2"): "1.24"}
# Their files are written without the runtime, and finished where it is.
_FINISHED_ELSEWHERE = ("tensorrt",)


def minimum_version(target: str, storage: str) -> str:
    """The oldest version of a runtime that engines are built for and that loads weights of this storage."""
    return _MINIMUM_OF_STORAGE.get((target, storage), MINIMUM[target])


def check_targets(storages: Mapping[str, str]) -> None:
    """Makes sure that engines for all targets can be built and measured here.

    Args:
        storages: Narrowest container of weights of each target in the recipe's section `export`.

    Raises:
        RuntimeMissingError: A runtime is not installed or too old.
    """
    for target, storage in storages.items():
        if target in _FINISHED_ELSEWHERE:
            continue
        hint = f'pip install "qyolo_deploy[build]", or leave {target} out of export.targets.'
        try:
            version = importlib.metadata.version(target)
        except importlib.metadata.PackageNotFoundError as error:
            message = f"export.targets: {target} is not installed, so its engine could not be built or measured"
            raise RuntimeMissingError(message, hint) from error
        if version_numbers(version) < version_numbers(MINIMUM[target]):
            raise RuntimeMissingError(
                f"export.targets: {target} {version} is too old, expected {MINIMUM[target]} or newer",
                hint,
            )
        if version_numbers(version) < version_numbers(minimum := minimum_version(target, storage)):
            raise RuntimeMissingError(
                f"export.storage: {target} {version} does not load {storage}, expected {minimum} or newer",
                f'pip install "{target}>={minimum}", or take a wider export.storage.',
            )


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, to compare it by."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
