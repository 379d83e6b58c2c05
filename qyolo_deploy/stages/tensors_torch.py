"""The tensors of torch views: the float model and the fake-quantized one."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from qyolo_deploy.graph.simulate import View, fold_float, simulate
from qyolo_deploy.models.base import Detector
from qyolo_deploy.models.registry import detector_of
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
    imgsz = None
    intact_db = EXACT_DB  # hooks change nothing

    def __init__(
        self,
        label: str,
        view: View,
        tensors: Mapping[str, str],
        grids: Mapping[str, Grid],
        trained_imgsz: int | None = None,
    ) -> None:
        self.label, self._view, self._tensors, self.grids = label, view, tensors, grids
        self.names, self.trained_imgsz = tuple(tensors), trained_imgsz
        for module in view.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # or it would write over the tensor that it reads

    def watch(self, names: Sequence[str]) -> Watch:
        """See `TensorSource`."""
        found: Tensors = {}
        for name in names:
            self._view.core.get_submodule(self._tensors[name]).register_forward_hook(_keeper(found, name))

        def run(images: NDArray[np.float32]) -> Tensors:
            found.clear()
            with torch.no_grad():
                self._view.core(torch.from_numpy(images))
            return dict(found)

        return run


def _keeper(found: Tensors, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[name] = output.numpy()

    return keep


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
