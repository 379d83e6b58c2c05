"""The tensors of OpenVINO models, as its CPU plugin computes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.engines.openvino import OpenVinoRunner
from qyolo_deploy.stages.tensors import Tensors, Watch, intact_db, is_module
from qyolo_deploy.validate.parity import EXACT_DB, Grid

_DEQUANTIZED = ".dequantized"


class OpenVinoTensors:
    """An IR of ours, see `TensorSource`.

    Rounded tensors become outputs of the model before it is compiled. A tensor may be rounded ahead of the operator
    that passes it on (`round_before_choosing`); such a tensor has no name any more and is not seen.

    Args:
        label: See `TensorSource`.
        path: Folder or .xml.
        precision_hint: See `OpenVinoRunner`.

    Raises:
        InputError: If it cannot be loaded.
        RuntimeMissingError: If OpenVINO is not installed.
    """

    in_order = False

    def __init__(self, label: str, path: Path, precision_hint: str = "f32") -> None:
        self._runner = OpenVinoRunner(path, precision_hint)  # with its checks and its messages
        self.label, self.imgsz, self.trained_imgsz = label, self._runner.imgsz, self._runner.trained_imgsz
        self.intact_db = EXACT_DB
        self._model = self._runner.open_again()
        self._outputs: dict[str, Any] = {}
        grids: dict[str, Grid] = {}
        self.grids: Mapping[str, Grid] = grids
        for node in self._model.get_ordered_ops():
            for output in node.outputs():
                for name in output.get_names():
                    self._see(name, output, grids)
        if not self._outputs:
            self._outputs = self._float_outputs()
        self.names: Sequence[str] = tuple(self._outputs)

    def _see(self, name: str, output: Any, grids: dict[str, Grid]) -> None:
        """Notes a tensor if it is a rounded one, or if its only reader rounds it."""
        node, module = output.get_node(), name.removesuffix(_DEQUANTIZED)
        if not is_module(module):
            return
        if module == name:
            readers = [port.get_node() for port in output.get_target_inputs()]
            if len(readers) != 1 or not _is_rounding(readers[0]) or readers[0].output(0).get_names():
                return
            node, output = readers[0], readers[0].output(0)
        self._outputs[module] = output
        if _is_rounding(node):
            grids[module] = _grid(node)

    def _float_outputs(self) -> dict[str, Any]:
        """Of a model without integers, the tensors of all modules."""
        outputs = (output for node in self._model.get_ordered_ops() for output in node.outputs())
        return {name: output for output in outputs for name in output.get_names() if is_module(name)}

    def watch(self, names: Sequence[str]) -> Watch:
        """See `TensorSource`."""
        own = len(self._model.outputs)
        self._model.add_outputs([self._outputs[name] for name in names])
        plain, looking = (self._runner.compile(model) for model in (self._runner.open_again(), self._model))
        is_first = True

        def run(images: NDArray[np.float32]) -> Tensors:
            nonlocal is_first
            found = looking(images)
            values = [np.asarray(found[index], np.float32) for index in range(own + len(names))]
            if is_first:
                expected = [np.asarray(value, np.float32) for value in plain(images).values()]
                self.intact_db, is_first = intact_db(values[:own], expected), False
            return dict(zip(names, values[own:], strict=True))

        return run


def _is_rounding(node: Any) -> bool:
    if node.get_type_name() != "FakeQuantize":
        return False
    return all(node.input_value(index).get_node().get_type_name() == "Constant" for index in (3, 4))


def _grid(node: Any) -> Grid:
    low, high = (float(node.input_value(index).get_node().data.reshape(-1)[0]) for index in (3, 4))
    scale = (high - low) / (node.get_levels() - 1)
    return Grid(scale, round(low / scale), round(high / scale))
