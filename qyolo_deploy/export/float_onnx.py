"""Exports the float network once, with ONNX tensors named after the modules that make them."""

import tempfile
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxsim
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass, NameFixPass, RemoveUnusedNodesPass
from torch import Tensor, fx, nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.graph.ops import call_name
from qyolo_deploy.graph.simulate import View
from qyolo_deploy.graph.trace import INPUT

OUTPUT = "output0"
_CORE = "core."
_OPSET = 18  # loads in every runtime of the last years; packed weights raise it
_AXES = {0: "batch", 2: "height", 3: "width"}
_COARSEST_STRIDE = 64
_MORE_THAN_RGB = 4  # dividing by it leaves 0 of the images' channels
_TOLERANCE = 1e-2  # of a row's mean; float32 alone takes a tenth of it where weights are random and scores saturate


def export_float(view: View, imgsz: int, dynamic: bool) -> ir.Model:
    """Exports a folded float detector.

    Args:
        view: From `fold_float`.
        imgsz: Side of the example image, and of every image where shapes are static.
        dynamic: Batch, height and width stay open.

    Returns:
        A graph with input `images` and output `output0`. The output of each module of the core is a value of the
        module's name (`model.0.conv`), which is how quantization parameters find their tensors.

    Raises:
        InputError: If the graph does not compute what the network computes.
    """
    # An example with sides and a batch of its own, so that no axis can be taken for another.
    example = torch.zeros((2, 3, imgsz, imgsz + _COARSEST_STRIDE) if dynamic else (1, 3, imgsz, imgsz))
    network = _Tapped(view)
    proto, _ = onnxsim.simplify(_export(network, example, dynamic))
    del proto.graph.output[1:]  # they have kept the names so far
    _drop_scopes(proto)
    _read_sizes_from_images(proto.graph, network.shapes)
    # A trace keeps whatever it takes for a constant, so that open shapes are tried on another one.
    other = (1, 3, imgsz + 2 * _COARSEST_STRIDE, _COARSEST_STRIDE)
    seeded = torch.Generator().manual_seed(0)
    _check(proto, view, torch.rand(other if dynamic else example.shape, generator=seeded))
    # The exporter writes a version that runtimes of two years ago refuse, whatever the content needs.
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    model: ir.Model = ir.from_proto(proto)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)
    return model


class _Tapped(nn.Module):
    """A view that gives what each module of its core makes beside its own output.

    Args:
        view: Whose core is traced.

    Attributes:
        names: Of what it gives beside.
        shapes: Channels and pixels per cell of what has both; known once it has run.
    """

    def __init__(self, view: View) -> None:
        super().__init__()
        core = deepcopy(view.core)
        assert isinstance(core, fx.GraphModule)
        calls = [node for node in core.graph.nodes if node.op == "call_module"]
        (end,) = (node for node in core.graph.nodes if node.op == "output")
        end.args = ((end.args[0], tuple(calls)),)
        for node in core.graph.nodes:
            if call_name(node) == "chunk":
                node.op, node.target = "call_function", _chunk
        core.recompile()
        self.names = [str(node.target) for node in calls]
        self.shapes: dict[str, tuple[int, int]] = {}
        self.core, self.decode = core, view.decode

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps, taps = self.core(images)
        for name, tap in zip(self.names, taps, strict=True):
            sides = [int(side) for side in tap.shape]
            stride = int(images.shape[2]) // sides[2] if len(sides) == len(images.shape) else 0
            if stride and sides[2:] == [int(side) // stride for side in images.shape[2:]]:
                self.shapes[name] = sides[1], stride
        return (self.decode(maps), *taps)


def _chunk(x: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """With sizes that the exporter takes for constants: it writes Slice in place of Split for what it must compute."""
    sizes = [int(part.shape[dim]) for part in x.chunk(chunks, dim)]
    return torch.split_with_sizes(x, sizes, dim)


def _export(network: _Tapped, example: Tensor, dynamic: bool) -> onnx.ModelProto:
    """By the exporter that traces: torch.export's arithmetic on open shapes takes 20 times as long for one graph."""
    axes = {INPUT: _AXES, OUTPUT: {0: "batch", 2: "anchors"}} if dynamic else None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about itself, and about shapes that are constants where they may be
        path = Path(folder, "float.onnx")
        torch.onnx.export(
            network.eval(),
            (example,),
            path,
            input_names=[INPUT],
            output_names=[OUTPUT, *network.names],
            opset_version=_OPSET,
            dynamic_axes=axes,
            dynamo=False,
        )
        return onnx.load(path)


def _read_sizes_from_images(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Computes the sizes of tensors from those of the images.

    OpenVINO (2026.4) takes the first channel's scale for all channels of a quantized tensor whose shape is read.

    Args:
        graph: Changed in place.
        shapes: Channels of each tensor of the core, and pixels per cell.
    """
    for node in [node for node in graph.node if node.op_type == "Shape" and node.input[0] in shapes]:
        (channels, stride), sizes = shapes[node.input[0]], node.output[0]
        steps = [("Div", [1, _MORE_THAN_RGB, stride, stride]), ("Add", [0, channels, 0, 0])]
        node.input[0], node.output[0] = INPUT, f"{sizes}.images"
        place, value = list(graph.node).index(node), node.output[0]
        for index, (kind, numbers) in enumerate(steps, start=1):
            other, result = f"{sizes}.{kind}", sizes if index == len(steps) else f"{value}.{kind}"
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers), other))
            graph.node.insert(place + index, onnx.helper.make_node(kind, [value, other], [result], result))
            value = result


@torch.no_grad()
def _check(proto: onnx.ModelProto, view: View, images: Tensor) -> None:
    """Compares the graph with the network, and tells its readers how many rows the output has."""
    wanted = view.eval()(images).numpy()
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = wanted.shape[1]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {INPUT: images.numpy()})
    near = found.shape == wanted.shape and np.all(abs(found - wanted).mean(2) <= _TOLERANCE * abs(wanted).mean(2))
    if not near:  # what is no number is not near either
        raise InputError("the exported graph does not compute what the network computes")


def _drop_scopes(proto: onnx.ModelProto) -> None:
    """Names parameters as the core has them, and leaves out what the exporter noted about its own run."""
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.removeprefix(_CORE)
    for node in proto.graph.node:
        node.input[:] = [name.removeprefix(_CORE) for name in node.input]
        node.ClearField("doc_string")
    del proto.graph.value_info[:]
