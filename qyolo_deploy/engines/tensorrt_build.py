"""Building an engine from the dialect's ONNX with TensorRT 10, 11 or TensorRT-RTX."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.console import Tick
from qyolo_deploy.engines.tensorrt_file import BuildRecord
from qyolo_deploy.engines.tensorrt_runtime import TensorRt, find_device, is_strongly_typed, precision_flags
from qyolo_deploy.engines.tensorrt_spec import TIMING_CACHE_NAME, BuildSpec
from qyolo_deploy.errors import InputError, RuntimeMissingError
from qyolo_deploy.recipe import TensorRtSection

_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
# Where in TensorRT's source something was noticed, and what its probing for a GPU says where there is none.
_PLACES = re.compile(r"\.?\s*\bIn \w+ at \S+?(?=\)|\s|$)")
_KIND = re.compile(r"(?:\S+: )?Error Code \d+: [\w ]+ \((?P<text>.*)\)$")
_NO_GPU = "cudaError 35"


@dataclass(frozen=True)
class BuiltPlan:
    """A serialized engine and where it was built."""

    plan: bytes
    record: BuildRecord


def build_plan(runtime: TensorRt, folder: Path, spec: BuildSpec, tick: Tick, kept: Path | None = None) -> BuiltPlan:
    """Builds an engine.

    Args:
        runtime: TensorRT, which needs a GPU for it, or TensorRT-RTX, which does not.
        folder: Where the specification's graph lies.
        spec: What to build.
        tick: Called with the builder's steps.
        kept: Folder of the timing cache; by default the graph's.

    Raises:
        InputError: If parser or builder refuse the graph; it names the node.
        RuntimeMissingError: If there is no GPU, or not what an option needs.
    """
    device = find_device()
    if device is None and not runtime.is_rtx:
        raise RuntimeMissingError(f"{runtime.title} builds on a GPU only, and none was found")
    log = shared_log(runtime)
    log.lines.clear()
    builder = runtime.module.Builder(log)
    if builder is None:
        raise RuntimeMissingError(f"{runtime.title} cannot start ({log.first_error()})")
    network = _parse(runtime, builder, folder / spec.onnx, log)
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(runtime.module, tick)
    _set_shapes(builder, config, network, spec)
    _set_options(runtime, builder, config, network, spec.options)
    cache_file = _load_timings(runtime, config, kept or folder, spec.options)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise InputError(
            f"{folder / spec.onnx}: {runtime.title} cannot build it: {_blamed(log.first_error(), network)}"
        )
    if cache_file is not None:
        write_atomic(cache_file, bytes(config.get_timing_cache().serialize()))
    record = BuildRecord(
        flavor=runtime.flavor,
        tensorrt=runtime.version,
        gpu=None if device is None else device.name,
        compute_capability=None if device is None else device.compute_capability,
        driver=None if device is None else device.driver,
        onnx_sha256=spec.onnx_sha256,
        weights_bytes=log.weights_bytes(),
        hardware_compatibility=spec.options.hardware_compatibility,
        version_compatible=spec.options.version_compatible,
    )
    return BuiltPlan(bytes(serialized), record)


def _parse(runtime: TensorRt, builder: Any, onnx: Path, log: Any) -> Any:
    trt = runtime.module
    typed = is_strongly_typed(runtime.flavor, runtime.version)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None) if typed else None
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        error = parser.get_error(0)
        node = f" the node '{error.node_name()}' ({error.node_operator()})" if error.node_name() else " it"
        raise InputError(f"{onnx}: {runtime.title} refuses{node}: {shorten(error.desc())}")
    return network


def _set_shapes(builder: Any, config: Any, network: Any, spec: BuildSpec) -> None:
    if spec.shapes is None:
        return
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, spec.shapes.min, spec.shapes.opt, spec.shapes.max)
    config.add_optimization_profile(profile)


def _set_options(runtime: TensorRt, builder: Any, config: Any, network: Any, options: TensorRtSection) -> None:
    trt = runtime.module
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if runtime.is_rtx:
        return
    for flag in precision_flags(runtime.flavor, runtime.version, options.fp16):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    config.builder_optimization_level = options.optimization_level
    level = options.hardware_compatibility.upper()
    if not hasattr(trt.HardwareCompatibilityLevel, level):
        raise RuntimeMissingError(f"{runtime.title} has no hardware_compatibility: {options.hardware_compatibility}")
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.dla_core is not None:
        _use_dla(runtime, builder, config, network, options)


def _use_dla(runtime: TensorRt, builder: Any, config: Any, network: Any, options: TensorRtSection) -> None:
    trt = runtime.module
    if options.dla_core is None or options.dla_core >= builder.num_DLA_cores:
        raise RuntimeMissingError(
            f"export.tensorrt.dla_core is {options.dla_core}, but this device has {builder.num_DLA_cores} DLA cores"
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = options.dla_core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if any(fnmatchcase(layer.name, glob) for glob in options.gpu_layers):
            config.set_device_type(layer, trt.DeviceType.GPU)


def _load_timings(runtime: TensorRt, config: Any, folder: Path, options: TensorRtSection) -> Path | None:
    """Gives the builder what an earlier build measured; returns where to keep it, None where it is not kept.

    A cache of another GPU or version is of no use: TensorRT says so and starts a new one.
    """
    if not options.timing_cache or runtime.is_rtx:
        return None
    path = folder / TIMING_CACHE_NAME
    timings = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if timings is None or not config.set_timing_cache(timings, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return path


@cache
def shared_log(runtime: TensorRt) -> Any:
    """What keeps the messages of a TensorRT; it takes one for the life of the process."""
    trt = runtime.module

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        """Keeps errors, and what the builder tells about memory."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[bool, str]] = []

        def log(self, severity: Any, message: str) -> None:
            is_error = severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            if is_error or "Weights Memory" in message:
                self.lines.append((is_error, message))

        def first_error(self) -> str:
            errors = (text for is_error, text in self.lines if is_error and _NO_GPU not in text)
            return shorten(next(errors, "it gives no reason"))

        def weights_bytes(self) -> int | None:
            found = [int(size) for _, text in self.lines for size in _WEIGHTS.findall(text)]
            return sum(found) if found else None

    return Log()


def _monitor(trt: Any, tick: Tick) -> Any:
    """The builder's outermost phase as progress; the phases inside it as its state."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost, self.steps, self.done = "", 1, 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.outermost, self.steps, self.done = phase, max(steps, 1), 0
            tick(self.done, self.steps, phase)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.outermost:
                self.done = min(step + 1, self.steps)
                tick(self.done, self.steps, phase)
            return True

        def phase_finish(self, phase: str) -> None:
            if phase == self.outermost:
                tick(self.steps, self.steps, phase)

    return Monitor()


def shorten(message: str) -> str:
    """A message of TensorRT without the places in its source and what follows from there being no GPU."""
    lines = [line for line in message.splitlines() if line.strip() and _NO_GPU not in line]
    told = [line for line in lines if not line.startswith("Invalid Node")] or lines or [message]
    text = " ".join(_PLACES.sub("", told[0]).split())
    kind = _KIND.search(text)
    return text if kind is None else kind["text"]


def _blamed(message: str, network: Any) -> str:
    """The message, led by the node that it is about, where it names one."""
    name = named_node(message, (network.get_layer(index).name for index in range(network.num_layers)))
    return message if name is None else f"node '{name}': {message}"


def named_node(message: str, names: Iterable[str]) -> str | None:
    """The longest of the names that a message contains as a whole word."""
    found = [name for name in names if name and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w|\.\w)", message)]
    return max(found, key=len, default=None)
