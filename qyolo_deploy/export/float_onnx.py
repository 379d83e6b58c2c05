"""Exports the float network once, with ONNX tensors named after the modules that make them."""

import ast
import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir
import onnxsim
import torch
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from qyolo_deploy.errors import InputError
from qyolo_deploy.graph.simulate import View
from qyolo_deploy.graph.trace import INPUT

OUTPUT = "output0"
_SCOPES = "pkg.torch.onnx.name_scopes"
_CORE = "core."
_OPSET = 18  # loads in every runtime of the last years; packed weights raise it
_AXES = {0: "batch", 2: "height", 3: "width"}


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
        InputError: If the exporter or simplifier does not keep a tensor of the network.
    """
    proto = _export(view, imgsz, dynamic)
    names = _rename_values(proto)
    proto, consistent = onnxsim.simplify(proto)
    if not consistent:
        raise InputError("the simplified graph does not compute what the network computes")
    model: ir.Model = ir.from_proto(proto)
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)
    # The exporter writes a version that runtimes of two years ago refuse, whatever the content needs.
    model.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    _strip_metadata(model)
    present = {value.name for node in model.graph for value in node.outputs}
    if missing := sorted(set(names) - present):
        raise InputError(f"the export lost the tensor '{missing[0]}'")
    return model


def _export(view: View, imgsz: int, dynamic: bool) -> onnx.ModelProto:
    # An example with sides and a batch of its own keeps the exporter from taking two axes for one.
    example = torch.zeros((2, 3, imgsz, imgsz + 32) if dynamic else (1, 3, imgsz, imgsz))
    shapes = {INPUT: dict.fromkeys(_AXES, torch.export.Dim.DYNAMIC)} if dynamic else None
    with _quiet():
        program = torch.onnx.export(
            view.eval(),
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=_OPSET,
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    if dynamic:
        for axis, name in _AXES.items():
            proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
        proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
        proto.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "anchors"
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _rename_values(proto: onnx.ModelProto) -> list[str]:
    """Names each module's last float output after the module; returns the names given.

    The arithmetic on open shapes, which carries the names of modules too, is in integers.
    """
    floats = {v.name for v in proto.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    del proto.graph.value_info[:]
    last: dict[str, str] = {}
    for node in proto.graph.node:
        if node.output[0] not in floats:
            continue
        module = _module_of({entry.key: entry.value for entry in node.metadata_props})
        if module is not None:
            last[module] = node.output[0]
    renamed = {old: new for new, old in last.items()}
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.removeprefix(_CORE)
    for node in proto.graph.node:
        node.input[:] = [name.removeprefix(_CORE) for name in node.input]
    return list(last)


def _module_of(metadata: Mapping[str, str]) -> str | None:
    """Path of the core's module that a node belongs to."""
    scopes = ast.literal_eval(metadata.get(_SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope.startswith(_CORE)]
    return modules[-1].removeprefix(_CORE) if modules else None


def _strip_metadata(model: ir.Model) -> None:
    """Leaves out what the exporter noted about its own run: it differs between machines."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
