"""The tensors of torch views: the float model and the fake-quantized one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import fx

from qyolo_deploy.errors import InputError
from qyolo_deploy.graph.simulate import View, fold_float, simulate
from qyolo_deploy.models.base import Detector
from qyolo_deploy.models.registry import detector_of, load_detector
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.stages.tensors import Tensors, Watch
from qyolo_deploy.validate.parity import EXACT_DB, Grid

_QUANTIZERS = "quantizers."


class TorchTensors:
    """A traced view, see `TensorSource`.

    Args:
        label: See there.
        view: From `fold_float` or `simulate`.
        tensors: Tensor name -> module that makes it, in order of execution.
        grids: See there.
        trained_imgsz: See there.
    """

    in_order = True
    intact_db = EXACT_DB  # hooks change nothing

    def __init__(
        self,
        label: str,
        view: View,
        tensors: Mapping[str, str],
        grids: Mapping[str, Grid],
        trained_imgsz: int | None = None,
    ) -> None:
        assert isinstance(view.core, fx.GraphModule)
        self.label, self._core, self._tensors, self.grids = label, view.core, tensors, grids
        self.names: Sequence[str] = tuple(tensors)
        self.imgsz: tuple[int, int] | None = None
        self.trained_imgsz = trained_imgsz
        for module in view.core.modules():
            if hasattr(module, "inplace"):
                setattr(module, "inplace", False)  # noqa: B010 - or it would write over the tensor that it reads

    def watch(self, names: Sequence[str]) -> Watch:
        """See `TensorSource`."""
        wanted = {self._tensors[name]: name for name in names}

        def run(images: NDArray[np.float32]) -> Tensors:
            recorder = _Recorder(self._core, wanted)
            with torch.no_grad():
                recorder.run(torch.from_numpy(images))
            return recorder.found

        return run


class _Recorder(fx.Interpreter):
    """Keeps what the nodes make; hooks would not tell apart modules that are shallow copies of one another."""

    def __init__(self, core: fx.GraphModule, wanted: Mapping[str, str]) -> None:
        super().__init__(core)
        self._wanted = wanted
        self.found: Tensors = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_module" and str(n.target) in self._wanted:
            self.found[self._wanted[str(n.target)]] = value.numpy()
        return value


def float_tensors(label: str, detector: Detector, trained_imgsz: int | None = None) -> TorchTensors:
    """The float model, batch normalisation folded."""
    view = fold_float(detector)
    return TorchTensors(label, view, {name: name for name in _called(view)}, {}, trained_imgsz)


def quantized_tensors(
    label: str, quantized: QuantizedModel, trained_imgsz: int | None = None, leave_out: frozenset[str] = frozenset()
) -> TorchTensors:
    """The fake-quantized model: tensors that are rounded, and what layers that stay float make.

    Args:
        label: Name of the view.
        quantized: The integers.
        trained_imgsz: See `TensorSource`.
        leave_out: Tensors that are not rounded.
    """
    view = simulate(detector_of(quantized.architecture), quantized, leave_out)
    kept_float = {name.rpartition(".")[0] for name in quantized.float_tensors}
    grids = {name: grid_of(qparams) for name, qparams in quantized.activations.items() if name not in leave_out}
    tensors = {}
    for module in _called(view):
        name = module.removeprefix(_QUANTIZERS)
        if name in grids or name in kept_float:
            tensors[name] = module  # a quantizer comes behind the module whose tensor it rounds
    return TorchTensors(label, view, tensors, grids, trained_imgsz)


def grid_of(qparams: QParams) -> Grid:
    """The grid of an activation in steps from its zero point."""
    zero_point = int(qparams.zero_point)
    return Grid(float(qparams.scale), qparams.spec.qmin - zero_point, qparams.spec.qmax - zero_point)


def _called(view: View) -> list[str]:
    """Modules of the core in order of execution."""
    assert isinstance(view.core, fx.GraphModule)
    return [str(node.target) for node in view.core.graph.nodes if node.op == "call_module"]


def checkpoint_tensors(label: str, path: Path, trained_imgsz: int | None = None) -> TorchTensors:
    """The view that a file holds: the fake-quantized model of our integers, else a float model.

    Raises:
        InputError: If the file is neither.
    """
    if path.suffix == ".safetensors" and "layers" in _header(path):
        return quantized_tensors(label, QuantizedModel.load(path), trained_imgsz)
    return float_tensors(label, load_detector(path, None, None, 0), trained_imgsz)


def _header(path: Path) -> dict[str, Any]:
    """Our metadata, which tell integers from a float checkpoint; empty where there are none."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("qyolo", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    return header if isinstance(header, dict) else {}
