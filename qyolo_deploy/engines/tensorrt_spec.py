"""The build specification of a TensorRT engine: all that a device needs to build, measure and judge it.

It lies beside its ONNX as `build.json`, so that a device without the training stack finishes what a machine without a
GPU began.
"""

import shlex
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.errors import InputError, IntegrityError
from qyolo_deploy.recipe import Gate, TensorRtSection, ValidateSection
from qyolo_deploy.strict import RelativePath, Sha256, Strict, validation_message

SPEC_NAME = "build.json"
TRTEXEC_NAME = "trtexec.txt"
TIMING_CACHE_NAME = "timing.cache"
SCHEMA_VERSION: Final = 1

_STRIDE = 32

Shape = tuple[int, int, int, int]


class Shapes(Strict):
    """An optimization profile: the smallest, the usual and the largest input `[N, 3, H, W]`."""

    min: Shape
    opt: Shape
    max: Shape


class BuildSpec(Strict):
    """Everything that decides an engine and its proof.

    Attributes:
        schema_version: Of this file.
        name: Stem of the engine's files.
        scheme: Short name of the bits.
        onnx: The graph, relative to the specification.
        onnx_sha256: Its digest.
        input: Name of the graph's input.
        shapes: Of the input; None where the graph fixes it.
        imgsz: Longer side of the images in pixels.
        options: How it is built.
        metadata: What the header of the `.engine` tells its reader.
        validation: How accuracy and latency are measured.
        gates: Those that name the view `tensorrt`.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    scheme: str
    onnx: RelativePath
    onnx_sha256: Sha256
    input: str
    shapes: Shapes | None
    imgsz: int
    options: TensorRtSection
    metadata: dict[str, Any]
    validation: ValidateSection
    gates: tuple[Gate, ...] = ()

    def to_text(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"


def profile(options: TensorRtSection, imgsz: int) -> Shapes:
    """The shapes of an engine with open batch and sides; letterboxed images may be as narrow as the stride."""
    batch = options.batch
    return Shapes(
        min=(batch.min, 3, _STRIDE, _STRIDE), opt=(batch.opt, 3, imgsz, imgsz), max=(batch.max, 3, imgsz, imgsz)
    )


def read_spec(path: Path) -> tuple[Path, BuildSpec]:
    """Reads a specification and makes sure that its graph is the one that it was written for.

    Args:
        path: The file, the folder that holds it, or a build or a release with `engines/tensorrt/`.

    Returns:
        The file's path and its content.

    Raises:
        InputError: If there is none, or it is not valid.
        IntegrityError: If the graph is missing or another one.
    """
    found = next((place for place in _places(path) if place.is_file()), None)
    if found is None:
        raise InputError(
            f"{path}: expected {SPEC_NAME}, or a folder with it or with engines/tensorrt/{SPEC_NAME}",
            hint="A build with tensorrt among export.targets writes one.",
        )
    try:
        spec = BuildSpec.model_validate_json(found.read_bytes())
    except ValidationError as error:
        raise InputError(f"{found}: {validation_message(error)}") from error
    onnx = found.parent / spec.onnx
    if not onnx.is_file():
        raise IntegrityError(f"{onnx}: missing, although {SPEC_NAME} names it")
    if sha256_file(onnx) != spec.onnx_sha256:
        raise IntegrityError(f"{onnx}: not the file that {SPEC_NAME} was written for")
    return found, spec


def _places(path: Path) -> tuple[Path, ...]:
    return (path, path / SPEC_NAME, path / "engines" / "tensorrt" / SPEC_NAME)


def trtexec_lines(spec: BuildSpec) -> str:
    """Command lines that build the same engine with NVIDIA's own tools, run beside the graph."""
    options = spec.options
    common = [f"--onnx={spec.onnx}", f"--saveEngine={spec.name}.plan"]
    if spec.shapes is not None:
        for key in ("min", "opt", "max"):
            sides = "x".join(map(str, getattr(spec.shapes, key)))
            common.append(f"--{key}Shapes={spec.input}:{sides}")
    if options.workspace_mib is not None:
        common.append(f"--memPoolSize=workspace:{options.workspace_mib}M")
    tuned = [f"--builderOptimizationLevel={options.optimization_level}"]
    tuned += [f"--timingCacheFile={TIMING_CACHE_NAME}"] if options.timing_cache else []
    tuned += _compatibility(options)
    if options.dla_core is not None:
        tuned += [f"--useDLACore={options.dla_core}", "--allowGPUFallback"]
        tuned += [f"--layerDeviceTypes={','.join(f'{glob}:GPU' for glob in options.gpu_layers)}"] * bool(
            options.gpu_layers
        )
    flags = ["--int8", *(["--fp16"] if options.fp16 else [])]
    lines = {
        "TensorRT 10": ["trtexec", *common, *tuned, *flags],
        "TensorRT 11, which takes all types from the graph": ["trtexec", *common, *tuned],
        "TensorRT-RTX": ["tensorrt_rtx", *common],
    }
    return "".join(f"# {title}\n{shlex.join(line)}\n" for title, line in lines.items())


def _compatibility(options: TensorRtSection) -> list[str]:
    levels = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}
    level = levels.get(options.hardware_compatibility)
    found = [f"--hardwareCompatibilityLevel={level}"] if level else []
    return [*found, "--versionCompatible"] if options.version_compatible else found
