"""The tensors of ONNX files, as ONNX Runtime computes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from qyolo_deploy.engines.onnxruntime import OnnxRuntimeRunner, session_options
from qyolo_deploy.stages.tensors import Tensors, Watch, intact_db, is_module
from qyolo_deploy.validate.parity import EXACT_DB, Grid

_DEQUANTIZED = ".dequantized"


class OnnxTensors:
    """A float or QDQ graph of ours, see `TensorSource`.

    The codes of rounded tensors become outputs of a copy of the graph, which leaves the runtime its integer kernels;
    the numbers between a kernel and its rounding are never there.

    Args:
        label: See `TensorSource`.
        path: The file.

    Raises:
        InputError: If it cannot be loaded.
    """

    in_order = True

    def __init__(self, label: str, path: Path) -> None:
        runner = OnnxRuntimeRunner(path)  # with its checks and its messages
        self.label, self.imgsz, self.trained_imgsz = label, runner.imgsz, runner.trained_imgsz
        self.intact_db = EXACT_DB
        self._model = onnx.load(path)
        self._makers = {name: node for node in self._model.graph.node for name in node.output}
        self._initializers = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._rounded = {
            name: node
            for node in self._model.graph.node
            if node.op_type == "DequantizeLinear" and (name := _rounded_name(node.output[0])) is not None
        }
        self._zero_points = {name: self._constant(node.input[2]) for name, node in self._rounded.items()}
        self.grids: Mapping[str, Grid] = {name: self._grid(name) for name in self._rounded}
        order = {name: index for index, name in enumerate(self._makers)}
        self.names: Sequence[str] = sorted([*self._rounded, *self._float_names()], key=lambda name: order.get(name, -1))

    def _constant(self, name: str) -> NDArray[Any]:
        value: NDArray[Any] = numpy_helper.to_array(self._initializers[name])
        return value

    def _grid(self, name: str) -> Grid:
        """Of a rounded tensor; its low end is that of the container, or of the Clip behind the rounding."""
        node, zero_point = self._rounded[name], self._zero_points[name]
        limits, codes = np.iinfo(zero_point.dtype), self._makers[node.input[0]]
        low = self._constant(codes.input[1]) if codes.op_type == "Clip" else limits.min
        return Grid(float(self._constant(node.input[1])), int(low) - int(zero_point), limits.max - int(zero_point))

    def _float_names(self) -> list[str]:
        """Tensors of modules that stay float; beside integers those of float convolutions alone.

        What stands between a kernel and its rounding there must not be touched, and decoding has no modules.
        """
        if not self._rounded:
            return [name for name in self._makers if is_module(name)]
        convolutions = [(name, node) for name, node in self._makers.items() if node.op_type == "Conv"]
        return [n for n, node in convolutions if n not in self._rounded and node.input[1] not in self._makers]

    def watch(self, names: Sequence[str]) -> Watch:
        """See `TensorSource`."""
        inside = {name: self._rounded[name].input[0] if name in self._rounded else name for name in names}
        plain, looking = self._session({}), self._session(inside)
        own = [output.name for output in plain.get_outputs()]
        asked = list(dict.fromkeys([*own, *inside.values()]))
        is_first = True

        def run(images: NDArray[np.float32]) -> Tensors:
            nonlocal is_first
            feed = {looking.get_inputs()[0].name: images}
            found = dict(zip(asked, looking.run(asked, feed), strict=True))
            if is_first:
                self.intact_db = intact_db([found[name] for name in own], plain.run(own, feed))
                is_first = False
            return {name: self._values(name, found[inner]) for name, inner in inside.items()}

        return run

    def _values(self, name: str, found: NDArray[Any]) -> NDArray[np.float32]:
        """What readers see of a tensor; of a rounded one there are its codes."""
        if name not in self._rounded:
            return np.asarray(found, np.float32)
        steps = found.astype(np.int32) - self._zero_points[name].astype(np.int32)
        return np.asarray(steps.astype(np.float32) * np.float32(self.grids[name].scale), np.float32)

    def _session(self, inside: Mapping[str, str]) -> Any:
        """A session on a copy of the graph with these further outputs."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        present = {output.name for output in model.graph.output}
        for name, inner in inside.items():
            is_codes = name in self._rounded
            kind = self._initializers[self._rounded[name].input[2]].data_type if is_codes else onnx.TensorProto.FLOAT
            if inner not in present:
                model.graph.output.append(onnx.helper.make_tensor_value_info(inner, kind, None))
        data = model.SerializeToString()
        return onnxruntime.InferenceSession(data, session_options(), providers=["CPUExecutionProvider"])


def _rounded_name(dequantized: str) -> str | None:
    """Name of the tensor that a DequantizeLinear stands for; None for weights, biases and parts of split tensors."""
    name = dequantized.removesuffix(_DEQUANTIZED)
    return name if name != dequantized and is_module(name) else None
