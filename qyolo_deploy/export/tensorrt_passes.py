"""Graph passes of TensorRT's dialect: shifted values, and half precision for convolutions that stay float."""

from collections.abc import Iterable, Set

import numpy as np
import onnx_ir as ir

from qyolo_deploy.quant.model import QuantizedModel

# What only chooses among the values that it is given takes them as they are, shifted or not.
_CHOOSING = frozenset(["Concat", "MaxPool", "Resize", "Split"])


def without_padding(model: ir.Model, quantized: QuantizedModel, names: Set[str]) -> list[str]:
    """Those tensors that quantized convolutions without padding alone read, directly or through a choice of values.

    A shift of such a tensor is a constant in the sums of each reader. Tensors that are joined are shifted together.

    Args:
        model: Float, from `export_float`.
        quantized: Its layers and tensors.
        names: Tensors that may be shifted.
    """
    joined = _joined(model)
    spoiled = {joined.get(str(value.name), str(value.name)) for value in model.graph.outputs}
    spoiled |= {joined.get(name, name) for name in quantized.activations if name not in names}
    for node in model.graph:
        if node.op_type not in _CHOOSING and not _is_unpadded(node, quantized):
            spoiled |= {joined.get(str(value.name), str(value.name)) for value in node.inputs if value is not None}
    return [name for name in quantized.activations if name in names and joined.get(name, name) not in spoiled]


def _joined(model: ir.Model) -> dict[str, str]:
    """Value name -> name of the set of values that choices connect it with; other values are absent."""
    sets: dict[str, str] = {}
    for node in model.graph:
        if node.op_type in _CHOOSING:
            data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
            members = [str(value.name) for value in (*data, *node.outputs) if value is not None]
            known = {sets.get(member, member) for member in members}
            label = min(known)
            sets |= dict.fromkeys(members, label)
            sets |= {member: label for member, old in sets.items() if old in known}
    return sets


def _is_unpadded(node: ir.Node, quantized: QuantizedModel) -> bool:
    is_layer = node.op_type == "Conv" and str(node.outputs[0].name) in quantized.layers
    return is_layer and not any(node.attributes.get_ints("pads", [0]))


def shift_values(graph: ir.Graph, name: str, middle: float) -> None:
    """Subtracts a constant from a tensor before anything reads it."""
    value = next(value for node in graph for value in node.outputs if value.name == name)
    readers = list(value.uses())
    data = np.asarray(middle, np.float32)
    constant = ir.Value(
        name=f"{name}.middle",
        const_value=ir.Tensor(data, name=f"{name}.middle"),
        shape=ir.Shape(()),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    graph.register_initializer(constant)
    node = ir.node("Sub", [value, constant], outputs=[ir.Value(name=f"{name}.shifted")], name=f"Sub:{name}.shifted")
    graph.append(node)
    for use in readers:
        use.node.replace_input_with(use.idx, node.outputs[0])


def compute_in_half(graph: ir.Graph, layers: Iterable[str]) -> None:
    """Sends convolutions with float weights through half precision; what comes out of them is float32 again.

    Builders that take all types from the graph have no other way, and the decode needs float32: a box of 640 pixels has
    steps of half a pixel in half precision.
    """
    convolutions = {str(node.outputs[0].name): node for node in graph if node.op_type == "Conv"}
    for name in layers:
        node = convolutions[name]
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, _half(graph, name, index, value))
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
        readers = list(node.outputs[0].uses())
        whole = _cast(graph, node.outputs[0], f"{name}.float", ir.DataType.FLOAT)
        for use in readers:
            use.node.replace_input_with(use.idx, whole)
    graph.sort()


def _half(graph: ir.Graph, name: str, index: int, value: ir.Value) -> ir.Value:
    """A value in half precision; a constant as such, so that it takes half the room."""
    if value.type is not None and value.type.dtype == ir.DataType.FLOAT16:
        return value
    if value.const_value is None:
        return _cast(graph, value, f"{name}.half", ir.DataType.FLOAT16)
    data = value.const_value.numpy().astype(np.float16)
    constant = ir.Value(
        name=f"{value.name}_half",
        const_value=ir.Tensor(data, name=f"{value.name}_half"),
        shape=ir.Shape(data.shape),
        type=ir.TensorType(ir.DataType.FLOAT16),
    )
    graph.register_initializer(constant)
    return constant


def _cast(graph: ir.Graph, value: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(dtype)}, outputs=[ir.Value(name=name)], name=f"Cast:{name}")
    graph.append(node)
    return node.outputs[0]
