"""Which TensorRT is there, what its version can do, and which GPU it would run on."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from qyolo_deploy.engines.requirements import MINIMUM, version_numbers
from qyolo_deploy.errors import RuntimeMissingError

Flavor = Literal["tensorrt", "tensorrt_rtx"]
FLAVORS: tuple[Flavor, ...] = ("tensorrt", "tensorrt_rtx")
_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


@dataclass(frozen=True)
class TensorRt:
    """An imported TensorRT.

    Args:
        module: Its Python package.
        flavor: TensorRT or TensorRT-RTX, whose files and abilities differ.
        version: Its version.
    """

    module: Any
    flavor: Flavor
    version: str

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{_TITLES[self.flavor]} {self.version}"

    @property
    def is_rtx(self) -> bool:
        """Whether kernels are chosen on the user's machine, so that engines are built without a GPU."""
        return self.flavor == "tensorrt_rtx"


@dataclass(frozen=True)
class Device:
    """A GPU: its name, compute capability such as `8.7`, and the newest CUDA that its driver runs."""

    name: str
    compute_capability: str
    driver: str


def import_tensorrt(flavor: Flavor | None = None) -> TensorRt:
    """The TensorRT that is installed, of two the one for all GPUs.

    Args:
        flavor: Only this one.

    Raises:
        RuntimeMissingError: If none is installed, or it is too old or does not load.
    """
    wanted = FLAVORS if flavor is None else (flavor,)
    for name in wanted:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                continue
            raise _broken(name, error) from error
        except (ImportError, OSError, RuntimeError) as error:
            raise _broken(name, error) from error
        return _checked(TensorRt(module, name, str(module.__version__)))
    titles = " and ".join(_TITLES[name] for name in wanted)
    raise RuntimeMissingError(
        f"{titles} {'are' if len(wanted) > 1 else 'is'} not installed",
        hint=f'pip install "qyolo_deploy[{_EXTRAS[wanted[0]]}]"; on Jetson, JetPack brings it.',
    )


def _broken(name: str, error: Exception) -> RuntimeMissingError:
    reason = " ".join(str(error).split())
    return RuntimeMissingError(f"{_TITLES[name]} is installed but does not load ({reason})")


def _checked(found: TensorRt) -> TensorRt:
    minimum = MINIMUM[found.flavor]
    if version_numbers(found.version) < version_numbers(minimum):
        raise RuntimeMissingError(f"{found.title} is too old, expected {minimum} or newer")
    return found


def precision_flags(flavor: Flavor, version: str, fp16: bool) -> tuple[str, ...]:
    """Builder flags without which a version computes in float32.

    From 11 on, and in TensorRT-RTX, networks are strongly typed: types stand in the graph and there are no such flags.
    """
    if is_strongly_typed(flavor, version):
        return ()
    return ("INT8", "FP16") if fp16 else ("INT8",)


def is_strongly_typed(flavor: Flavor, version: str) -> bool:
    """Whether a version takes all types from the graph."""
    return flavor == "tensorrt_rtx" or version_numbers(version) >= (11,)


@cache
def cuda() -> Any:
    """The CUDA runtime.

    Raises:
        RuntimeMissingError: If its Python bindings are not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise RuntimeMissingError(
            "the CUDA bindings for Python are not installed", hint="pip install cuda-bindings"
        ) from error


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of the CUDA runtime; returns its result, several as a tuple.

    Raises:
        RuntimeMissingError: If it fails.
    """
    status, *results = function(*arguments)
    if int(status) != 0:
        raise RuntimeMissingError(f"CUDA: {function.__name__} failed with {status.name} ({int(status)})")
    return results[0] if len(results) == 1 else tuple(results)


@cache
def find_device() -> Device | None:
    """The GPU that engines run on; None without one, or without CUDA's bindings."""
    try:
        runtime = cuda()
        if call(runtime.cudaGetDeviceCount) == 0:
            return None
        properties = call(runtime.cudaGetDeviceProperties, 0)
        version = call(runtime.cudaDriverGetVersion)
    except RuntimeMissingError:
        return None
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Device(name, f"{properties.major}.{properties.minor}", f"CUDA {version // 1000}.{version % 1000 // 10}")
