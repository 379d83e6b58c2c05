"""OpenVINO on the CPU: building IR from a QDQ ONNX, and running it."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from qyolo_deploy.engines.base import Mode, parse_head, parse_imgsz, parse_names
from qyolo_deploy.engines.heads import METADATA_KEY
from qyolo_deploy.engines.kernels import Kernel
from qyolo_deploy.engines.openvino_kernels import profile_kernels
from qyolo_deploy.errors import InputError, RuntimeMissingError


def import_openvino() -> Any:
    """The openvino package.

    Raises:
        RuntimeMissingError: If it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise RuntimeMissingError("OpenVINO is not installed", hint='pip install "qyolo_deploy[openvino]"') from error
    return openvino


@cache
def _core() -> Any:
    """One core for the life of the process.

    The CPU plugin of each core registers a stack for signal handlers (for AMX) and frees it at its end. Of several
    cores, one may put back what another has freed, and the next signal that Python handles ends the process.
    """
    return import_openvino().Core()


def build_openvino(
    onnx_file: Path, folder: Path, stem: str, metadata: dict[str, Any], passes: Sequence[Callable[[Any], None]] = ()
) -> None:
    """Converts a QDQ ONNX file to IR in the layout that ultralytics reads.

    Args:
        onnx_file: The model.
        folder: Existing folder for `<stem>.xml`, `<stem>.bin` and `metadata.yaml`.
        stem: Name of the IR files.
        metadata: Content of `metadata.yaml`.
        passes: Each changes the `openvino.Model` before it is written.
    """
    openvino = import_openvino()
    model = openvino.convert_model(onnx_file)
    for change in passes:
        change(model)
    # Weights that stay float must not be rounded to half precision: the engine is held to the trained model.
    openvino.save_model(model, folder / f"{stem}.xml", compress_to_fp16=False)
    (folder / "metadata.yaml").write_text(yaml.safe_dump(metadata, sort_keys=False), encoding="utf-8")


class OpenVinoRunner:
    """A compiled model; see `Runner`.

    Args:
        path: The `.xml`, or a folder with exactly one.
        precision_hint: `f32` or `bf16`; machines with AMX take bf16 by themselves, which is no parity.
        conf: See `open_engine`.
        threads: See `open_engine`.
        mode: See `open_engine`.

    Raises:
        InputError: If the files are not there or cannot be loaded.
        RuntimeMissingError: If OpenVINO is not installed.
    """

    runtime = "openvino"

    def __init__(
        self,
        path: Path,
        precision_hint: str = "f32",
        conf: float = 0.001,
        threads: int | None = None,
        mode: Mode = "latency",
    ) -> None:
        openvino = import_openvino()
        self.path, self.precision_hint, self._conf = path, precision_hint, conf
        xml = _xml_of(path)
        options: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": precision_hint, "PERFORMANCE_HINT": mode.upper()}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            model = _core().read_model(xml)
            self._open = partial(_core().read_model, xml)
            self.compile = partial(_core().compile_model, device_name="CPU", config=options)
            self._compile = partial(self.compile, model)
            self._profiled = partial(_core().compile_model, model, "CPU", options | {"PERF_COUNT": "YES"})
            compiled = self._compile()
            several = mode == "throughput"
            self.parallel = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") if several else 1
            self._requests = _requests(compiled, self.parallel)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{xml}: OpenVINO {openvino.__version__} cannot load it ({reason})") from error
        self._outputs = [_name_of(output) for output in model.outputs]
        shape = model.inputs[0].partial_shape
        if len(model.inputs) != 1 or len(shape) != 4:
            raise InputError(f"{xml}: expected one input [N, 3, H, W]")
        static = shape[2].is_static and shape[3].is_static
        self.imgsz = (shape[2].get_length(), shape[3].get_length()) if static else None
        metadata = _metadata_beside(xml)
        self.head = parse_head(xml, metadata.get(METADATA_KEY), len(model.outputs))
        self.names, self.trained_imgsz = (
            parse_names(metadata.get("names")),
            parse_imgsz(metadata.get("imgsz")),
        )

    def open_again(self) -> Any:
        """The `openvino.Model` once more, to be changed and given to `compile`, which takes the runner's options."""
        return self._open()

    def profile(self, images: NDArray[np.float32], runs: int = 9) -> list[Kernel]:
        """The kernels that run, with their times; images float32 `[N, 3, H, W]`, times are medians over the runs."""
        return profile_kernels(self._profiled(), images, runs)

    def __call__(self, images: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Runs the compiled model."""
        outputs = list(self.outputs(images).values())
        return outputs[0] if self.head is None else self.head.decode(outputs, self._conf)

    def outputs(self, images: NDArray[np.float32], /) -> dict[str, NDArray[np.float32]]:
        """Runs the compiled model."""
        requests = self._requests
        request = requests.get()
        try:
            outputs = request.infer(images, share_inputs=True)
        except RuntimeError as error:
            # The plugin keeps shapes of the run that failed, and would then refuse images of the size before it.
            self._requests = _requests(self._compile(), self.parallel)
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: cannot run on images of shape {images.shape} ({reason})") from error
        finally:
            requests.put(request)
        return {name: np.asarray(outputs[index], np.float32) for index, name in enumerate(self._outputs)}


def _name_of(output: Any) -> str:
    names = sorted(output.get_names())  # a file of another tool may have none
    return str(names[0]) if names else f"output{output.get_index()}"


def _requests(compiled: Any, count: int) -> SimpleQueue[Any]:
    """Inference requests of a compiled model; each serves one call at a time."""
    requests: SimpleQueue[Any] = SimpleQueue()
    for _ in range(count):
        requests.put(compiled.create_infer_request())
    return requests


def _xml_of(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.xml"))
    if len(found) != 1:
        raise InputError(f"{path}: expected a folder with one OpenVINO .xml, found {len(found)}")
    return found[0]


def _metadata_beside(xml: Path) -> dict[str, Any]:
    """Content of the `metadata.yaml` of ultralytics' layout; empty where there is none."""
    try:
        data = yaml.safe_load((xml.parent / "metadata.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}
