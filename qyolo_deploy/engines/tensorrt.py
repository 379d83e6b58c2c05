"""TensorRT and TensorRT-RTX on the GPU: running an engine file."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.engines.base import parse_head, parse_imgsz, parse_names
from qyolo_deploy.engines.heads import METADATA_KEY
from qyolo_deploy.engines.tensorrt_buffers import DeviceBuffers, Stream
from qyolo_deploy.engines.tensorrt_build import shared_log
from qyolo_deploy.engines.tensorrt_file import BuildRecord, check_record, read_engine
from qyolo_deploy.engines.tensorrt_runtime import FLAVORS, TensorRt, find_device, import_tensorrt
from qyolo_deploy.errors import InputError, RuntimeMissingError

_Shape = tuple[int, ...]


class TensorRtRunner:
    """A deserialized engine with buffers of its own; see `Runner`.

    Where the input's shape is fixed, copies and kernels are launched as one CUDA graph.

    Args:
        path: An `.engine` with the header of ultralytics, or a `.plan`.
        conf: See `open_engine`.

    Raises:
        InputError: If the file cannot be loaded or is not a detector's.
        RuntimeMissingError: If TensorRT or a GPU are missing, or are others than those that it was built for.
    """

    runtime = "tensorrt"
    precision_hint = None
    parallel = 1

    def __init__(self, path: Path, conf: float = 0.001) -> None:
        self.path, self._conf = path, conf
        metadata, record, plan = read_engine(path)
        trt = _runtime_for(path, record)
        log = shared_log(trt)
        log.lines.clear()
        self._trt, self._runtime = trt.module, trt.module.Runtime(log)
        if record is not None and record.version_compatible:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise InputError(f"{path}: {trt.title} cannot load it ({log.first_error()})")
        self._input, self._outputs = self._tensors()
        self._context = self._engine.create_execution_context()
        shape = tuple(self._engine.get_tensor_shape(self._input))
        self._is_fixed = all(side > 0 for side in shape)
        self.imgsz = shape[2:] if min(shape[2:]) > 0 else None
        self.names, self.trained_imgsz = parse_names(metadata.get("names")), parse_imgsz(metadata.get("imgsz"))
        self.head = parse_head(path, metadata.get(METADATA_KEY), len(self._outputs))
        self._stream, self._buffers = Stream(), DeviceBuffers()

    def _tensors(self) -> tuple[str, list[str]]:
        """Names of the input and of the outputs."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        is_float = all(self._engine.get_tensor_dtype(name) == self._trt.float32 for name in names)
        if len(inputs) != 1 or not is_float or len(self._engine.get_tensor_shape(inputs[0])) != 4:
            raise InputError(f"{self.path}: expected one float32 input [N, 3, H, W] and float32 outputs")
        return inputs[0], outputs

    def __call__(self, images: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Runs on the GPU."""
        outputs = list(self.outputs(images).values())
        return outputs[0] if self.head is None else self.head.decode(outputs, self._conf)

    def outputs(self, images: NDArray[np.float32], /) -> dict[str, NDArray[np.float32]]:
        """Copies the images to the GPU, runs, and copies the outputs back."""
        self._set_shape(images.shape)
        self._buffers.host(self._input)[...] = images
        if self._is_fixed:
            self._stream.replay(self._enqueue)
        else:
            self._enqueue()
        self._stream.wait()
        # Copied, as the buffers are written again by the next call.
        return {name: self._buffers.host(name).copy() for name in self._outputs}

    def _set_shape(self, shape: _Shape) -> None:
        if self._buffers.has(self._input, shape):
            return
        if not self._context.set_input_shape(self._input, shape):
            raise InputError(f"{self.path}: cannot run on images of shape {shape}{self._taken()}")
        for name in (self._input, *self._outputs):
            address = self._buffers.resize(name, tuple(self._context.get_tensor_shape(name)))
            self._context.set_tensor_address(name, address)

    def _taken(self) -> str:
        """What shapes the engine takes, for an error."""
        low, _, high = self._engine.get_tensor_profile_shape(self._input, 0)
        return f" (it takes {tuple(low)} to {tuple(high)})"

    def _enqueue(self) -> None:
        self._buffers.upload(self._input, self._stream)
        if not self._context.execute_async_v3(self._stream.handle):
            raise RuntimeMissingError(f"{self.path}: TensorRT could not run the engine")
        for name in self._outputs:
            self._buffers.download(name, self._stream)


def _runtime_for(path: Path, record: BuildRecord | None) -> TensorRt:
    """The TensorRT that a plan needs, once it is clear that it and the GPU are those that it was built for."""
    trt = import_tensorrt(FLAVORS[0] if record is None else record.flavor)
    device = find_device()
    if device is None:
        raise RuntimeMissingError(f"{path}: {trt.title} runs on a GPU only, and none was found")
    if record is not None:
        check_record(path, record, trt.version, device)
    return trt
