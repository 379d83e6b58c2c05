"""ONNX Runtime on the CPU."""

from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from qyolo_deploy.engines.base import Mode, parse_head, parse_imgsz, parse_names, share_cores
from qyolo_deploy.engines.heads import METADATA_KEY
from qyolo_deploy.engines.kernels import Kernel
from qyolo_deploy.engines.onnxruntime_kernels import profile_kernels
from qyolo_deploy.errors import InputError

_LOAD_ERRORS = (
    errors.Fail,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NotImplemented,
    errors.NoSuchFile,
)


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options with which sessions compute what the file says, on processors without VNNI too.

    AVX2 and AVX-512 without VNNI add two products of uint8 and int8 in 16 bits, which saturate; where weights are
    large enough for that, ONNX Runtime then takes slower kernels that do not. Elsewhere the option changes nothing.

    Args:
        threads: Of the CPU that compute; by default the runtime's choice.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0  # 0 is the runtime's choice
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


class OnnxRuntimeRunner:
    """A session on an ONNX file; see `Runner`.

    Args:
        path: The file.
        conf: See `open_engine`.
        threads: See `open_engine`.
        mode: See `open_engine`.

    Raises:
        InputError: If the file cannot be loaded or is not a detector's.
    """

    runtime = "onnxruntime"
    precision_hint = None

    def __init__(self, path: Path, conf: float = 0.001, threads: int | None = None, mode: Mode = "latency") -> None:
        self.path, self._conf = path, conf
        # A session on one thread computes in the thread that calls it, so that calls share nothing but the weights.
        self.parallel, threads = share_cores(threads) if mode == "throughput" else (1, threads)
        self._options = partial(session_options, threads)
        try:
            self._session = onnxruntime.InferenceSession(str(path), self._options(), providers=["CPUExecutionProvider"])
        except (*_LOAD_ERRORS, errors.InvalidArgument) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it ({reason})") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
            raise InputError(f"{path}: expected one float32 input [N, 3, H, W]")
        self._input = inputs[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]
        height, width = inputs[0].shape[2:]
        self.imgsz = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.head = parse_head(path, metadata.get(METADATA_KEY), len(self._outputs))
        self.names, self.trained_imgsz = (
            parse_names(metadata.get("names")),
            parse_imgsz(metadata.get("imgsz")),
        )

    def profile(self, images: NDArray[np.float32], runs: int = 9) -> list[Kernel]:
        """The kernels that run, with their times; images float32 `[N, 3, H, W]`, times are medians over the runs."""
        return profile_kernels(self.path, self._options(), images, runs)

    def __call__(self, images: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Runs the session."""
        outputs = list(self.outputs(images).values())
        return outputs[0] if self.head is None else self.head.decode(outputs, self._conf)

    def outputs(self, images: NDArray[np.float32], /) -> dict[str, NDArray[np.float32]]:
        """Runs the session."""
        try:
            outputs: list[NDArray[np.float32]] = self._session.run(self._outputs, {self._input: images})
        except (errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: cannot run on images of shape {images.shape} ({reason})") from error
        return dict(zip(self._outputs, outputs, strict=True))
