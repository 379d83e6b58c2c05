"""Memory of an engine's inputs and outputs, on the GPU and pinned on the host, and the stream that fills it."""

import contextlib
import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.engines.tensorrt_runtime import call, cuda
from qyolo_deploy.errors import RuntimeMissingError

_FLOAT_BYTES = 4


class Stream:
    """A CUDA stream that can repeat its work as a graph."""

    def __init__(self) -> None:
        self._cuda = cuda()
        self._stream = call(self._cuda.cudaStreamCreate)
        self._graph: Any = None
        self._is_warm = False

    @property
    def handle(self) -> int:
        """What TensorRT takes."""
        return int(self._stream)

    def wait(self) -> None:
        """Returns once all work is done."""
        call(self._cuda.cudaStreamSynchronize, self._stream)

    def replay(self, work: Callable[[], None]) -> None:
        """Enqueues work that is the same each time: the first time as it is, then captured, from then on as a graph.

        The first run may compile kernels and allocate, which cannot be captured.
        """
        if self._graph is None and self._is_warm:
            self._graph = self._capture(work)
        if self._graph is None:
            work()
            self._is_warm = True
        else:
            call(self._cuda.cudaGraphLaunch, self._graph, self._stream)

    def _capture(self, work: Callable[[], None]) -> Any:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(self._cuda.cudaStreamBeginCapture, self._stream, mode)
        work()
        graph = call(self._cuda.cudaStreamEndCapture, self._stream)
        return call(self._cuda.cudaGraphInstantiate, graph, 0)

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeMissingError, AttributeError):  # at the interpreter's end, CUDA may be gone
            if self._graph is not None:
                call(self._cuda.cudaGraphExecDestroy, self._graph)
            call(self._cuda.cudaStreamDestroy, self._stream)


@dataclass
class _Buffer:
    """Room for the largest shape so far."""

    device: int
    pinned: int
    capacity: int
    view: NDArray[np.float32]


class DeviceBuffers:
    """A pair of buffers for each tensor, float32."""

    def __init__(self) -> None:
        self._cuda = cuda()
        self._buffers: dict[str, _Buffer] = {}

    def has(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has this shape already."""
        return name in self._buffers and self._buffers[name].view.shape == shape

    def resize(self, name: str, shape: tuple[int, ...]) -> int:
        """Gives a tensor another shape; returns its address on the GPU."""
        size = math.prod(shape) * _FLOAT_BYTES
        buffer = self._buffers.get(name)
        if buffer is None or buffer.capacity < size:
            self._free(name)
            device, pinned = int(call(self._cuda.cudaMalloc, size)), int(call(self._cuda.cudaMallocHost, size))
            buffer = _Buffer(device, pinned, size, np.empty(0, np.float32))
            self._buffers[name] = buffer
        buffer.view = _view(buffer.pinned, shape)
        return buffer.device

    def host(self, name: str) -> NDArray[np.float32]:
        """A tensor's pinned memory."""
        return self._buffers[name].view

    def upload(self, name: str, stream: Stream) -> None:
        """Copies a tensor from the host to the GPU."""
        self._copy(name, stream, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, name: str, stream: Stream) -> None:
        """Copies a tensor from the GPU to the host."""
        self._copy(name, stream, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def _copy(self, name: str, stream: Stream, kind: Any) -> None:
        buffer = self._buffers[name]
        up = kind == self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        target, source = (buffer.device, buffer.pinned) if up else (buffer.pinned, buffer.device)
        call(self._cuda.cudaMemcpyAsync, target, source, buffer.view.nbytes, kind, stream.handle)

    def _free(self, name: str) -> None:
        buffer = self._buffers.pop(name, None)
        if buffer is not None:
            call(self._cuda.cudaFree, buffer.device)
            call(self._cuda.cudaFreeHost, buffer.pinned)

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeMissingError, AttributeError):
            for name in list(self._buffers):
                self._free(name)


def _view(address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Memory at an address as an array."""
    memory = (ctypes.c_float * math.prod(shape)).from_address(address)
    return np.ctypeslib.as_array(memory).reshape(shape)
