"""Graph passes that turn a float ONNX graph into a QDQ one from a `QuantizedModel`.

Each pass states what it needs and leaves (`requires`, `ensures`); the tensors are found by the names that
`export_float` gave them.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qyolo_deploy.errors import InputError
from qyolo_deploy.export.saturation import Method, container_of, low_bit_activations, shift_to_top
from qyolo_deploy.export.storage import container_for, raise_opset
from qyolo_deploy.quant.model import QuantizedLayer, QuantizedModel
from qyolo_deploy.quant.qparams import QParams

Clipping = Literal["codes", "values"]


def insert_qdq(
    model: ir.Model,
    quantized: QuantizedModel,
    *,
    leave_out: frozenset[str] = frozenset(),
    storage: str = "int8",
    clip: Clipping = "codes",
    float_biases: Mapping[str, NDArray[np.float32]] | None = None,
) -> ir.Model:
    """Makes a QDQ model; the float model is left as it is.

    Args:
        model: From `export_float`.
        quantized: Integers, scales and zero points.
        leave_out: Tensors that this target does not round although the model was trained with it. Those that come
            out of a convolution are still clipped to their grid's range: low-bit training uses that as a bound of
            SiLU's input, and runtimes fuse it.
        storage: `int8`, or the narrowest type that weights are packed in where it holds their grid: `int4`, `int2`.
            The opset is raised to the one that has the types used.
        clip: What is clipped where a grid of few bits needs it, and by a ReLU: `codes` keeps ONNX Runtime in
            integers, `values` is what OpenVINO fuses into the convolution. Both give the same codes.
        float_biases: Biases of all layers, float32 `[C_out]`, for a runtime that takes no integer ones.

    Returns:
        A model in which every quantized tensor passes QuantizeLinear and DequantizeLinear, weights are integer
        initializers and biases int32. The codes of activations of fewer bits lie at the top of the 8-bit container,
        so that it saturates where the grid ends; see `low_bit_activations` for the lower end.

    Raises:
        InputError: If the graph does not have a tensor of the quantized model.
    """
    graph_model = model.clone()
    _requires(graph_model.graph, quantized)
    for name, layer in quantized.layers.items():
        bias = None if float_biases is None else float_biases[name]
        _quantize_layer(graph_model, name, layer, quantized, storage, bias)
    for name in {key.rpartition(".")[0] for key in quantized.float_tensors}:
        set_float_layer(graph_model.graph, name, quantized)
    for name, qparams in quantized.activations.items():
        if name not in leave_out:
            _quantize_value(graph_model.graph, _value(graph_model.graph, name), qparams)
    _repeat_over_splits(graph_model.graph)
    methods = low_bit_activations(model, quantized, leave_out)
    for name, qparams in quantized.activations.items():
        if name not in leave_out:
            _keep_low_end(graph_model.graph, name, qparams, methods.get(name), clip)
        elif name in quantized.layers:
            clip_values(graph_model.graph, name, qparams)
    graph_model.graph.sort()
    _ensures(graph_model.graph, quantized, 3 if float_biases is None else 2)
    return graph_model


def _requires(graph: ir.Graph, quantized: QuantizedModel) -> None:
    """Every tensor is there, and every layer is a convolution with constant weights."""
    for name in quantized.activations:
        _value(graph, name)
    for name in quantized.layers:
        node = _value(graph, name).producer()
        if node is None or node.op_type != "Conv" or any(v.const_value is None for v in _constants(node)):
            raise InputError(f"'{name}' is not a convolution with constant weights in the exported graph")


def _ensures(graph: ir.Graph, quantized: QuantizedModel, inputs: int) -> None:
    """The first inputs of all quantized convolutions come out of DequantizeLinear."""
    for name in quantized.layers:
        for value in _conv_of(graph, name).inputs[:inputs]:
            producer = value.producer() if value is not None else None
            if producer is None or producer.op_type != "DequantizeLinear":
                raise InputError(f"an input of '{name}' is not quantized in the exported graph")


def _constants(node: ir.Node) -> Iterable[ir.Value]:
    return [value for value in node.inputs[1:] if value is not None]


def _value(graph: ir.Graph, name: str) -> ir.Value:
    for value in graph.inputs:
        if value.name == name:
            return value
    for node in graph:
        for value in node.outputs:
            if value.name == name:
                return value
    raise InputError(f"the exported graph has no tensor '{name}'")


def _conv_of(graph: ir.Graph, name: str) -> ir.Node:
    node = _value(graph, name).producer()
    assert node is not None
    return node


def constant(graph: ir.Graph, name: str, data: NDArray[np.generic], dtype: ir.DataType | None = None) -> ir.Value:
    """Adds an initializer; packed data need their type told."""
    tensor = ir.Tensor(data, name=name) if dtype is None else ir.Tensor(data, dtype=dtype, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def add_node(
    graph: ir.Graph,
    op_type: str,
    inputs: list[ir.Value],
    output: str,
    attributes: dict[str, int] | None = None,
) -> ir.Value:
    """Adds an operator with one output of this name, which it returns."""
    node = ir.node(op_type, inputs, attributes or {}, outputs=[ir.Value(name=output)], name=f"{op_type}:{output}")
    graph.append(node)
    return node.outputs[0]


def _quantize_layer(
    model: ir.Model,
    name: str,
    layer: QuantizedLayer,
    quantized: QuantizedModel,
    storage: str,
    float_bias: NDArray[np.float32] | None,
) -> None:
    """Integer weights, through a Cast where they are packed, and an int32 bias or a float one."""
    graph = model.graph
    scale = constant(graph, f"{name}.weight_scale", layer.qparams.scale)
    dequantized = dequantize_weight(graph, name, _stored_weight(model, name, layer, storage), scale)
    if float_bias is not None:
        set_constants(graph, name, dequantized, constant(graph, f"{name}.bias_float", float_bias))
        return
    bias = constant(graph, f"{name}.bias_quantized", layer.bias)
    bias_scale = constant(graph, f"{name}.bias_scale", quantized.bias_scale(name))
    set_constants(
        graph,
        name,
        dequantized,
        add_node(graph, "DequantizeLinear", [bias, bias_scale], f"{name}.bias_dequantized", {"axis": 0}),
    )


def dequantize_weight(graph: ir.Graph, name: str, integers: ir.Value, scale: ir.Value) -> ir.Value:
    """The weights of a layer behind DequantizeLinear, with their zero points written out.

    ONNX Runtime may change int8 weights to uint8 where a processor lacks VNNI, and where such weights have no zero
    points and the convolution stays float it adds a single one, which it then refuses (1.32).
    """
    assert scale.const_value is not None
    zeros = constant(graph, f"{name}.weight_zero_point", np.zeros(scale.const_value.numpy().shape, np.int8))
    return add_node(graph, "DequantizeLinear", [integers, scale, zeros], f"{name}.weight_dequantized", {"axis": 0})


def set_float_layer(graph: ir.Graph, name: str, quantized: QuantizedModel) -> None:
    """Weights of a layer that stays float, as training left them."""
    weight = constant(graph, f"{name}.weight_trained", quantized.float_tensors[f"{name}.weight"])
    bias = constant(graph, f"{name}.bias_trained", quantized.float_tensors[f"{name}.bias"])
    set_constants(graph, name, weight, bias)


def set_constants(graph: ir.Graph, name: str, weight: ir.Value, bias: ir.Value) -> None:
    """Gives a convolution other weights and biases, and drops those that nothing reads any more."""
    conv = _conv_of(graph, name)
    old = [value for value in conv.inputs[1:] if value is not None]
    conv.resize_inputs(3)
    conv.replace_input_with(1, weight)
    conv.replace_input_with(2, bias)
    for value in old:
        if not value.uses() and value.name is not None:
            graph.initializers.pop(value.name, None)


def _stored_weight(model: ir.Model, name: str, layer: QuantizedLayer, storage: str) -> ir.Value:
    graph, container = model.graph, container_for(layer.qparams.spec, storage)
    if container is None:
        return constant(graph, f"{name}.weight_quantized", layer.weight)
    raise_opset(model, container)
    data = layer.weight.astype(container.dtype.numpy())
    packed = constant(graph, f"{name}.weight_quantized", data, container.dtype)
    # ONNX Runtime folds this cast at load and then runs its int8 kernel; without it the convolution runs in float.
    return add_node(graph, "Cast", [packed], f"{name}.weight_int8", {"to": int(ir.DataType.INT8)})


def _quantize_value(graph: ir.Graph, value: ir.Value, qparams: QParams) -> None:
    """Sends all readers of a value through Q and DQ, with the codes at the top of their container.

    The zero point moves by what the grid's bits say, not by what its values need, so that tensors of one grid keep
    one zero point and a runtime goes on joining and pooling their integers.
    """
    name, spec = value.name, qparams.spec
    scale = constant(graph, f"{name}.scale", qparams.scale)
    moved = (qparams.zero_point + shift_to_top(spec)).astype(container_of(spec))
    zero_point = constant(graph, f"{name}.zero_point", moved)
    _insert_pair(graph, value, scale, zero_point)


def _insert_pair(graph: ir.Graph, value: ir.Value, scale: ir.Value, zero_point: ir.Value) -> None:
    readers = list(value.uses())
    quantized = add_node(graph, "QuantizeLinear", [value, scale, zero_point], f"{value.name}.quantized")
    result = add_node(graph, "DequantizeLinear", [quantized, scale, zero_point], f"{value.name}.dequantized")
    for use in readers:
        use.node.replace_input_with(use.idx, result)


def _repeat_over_splits(graph: ir.Graph) -> None:
    """Parts of a quantized tensor are quantized with its scale, so that a runtime splits integers."""
    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type == "Split" and node.inputs[0] is not None else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        scale, zero_point = source.inputs[1], source.inputs[2]
        assert scale is not None and zero_point is not None
        for part in node.outputs:
            _insert_pair(graph, part, scale, zero_point)


def _keep_low_end(graph: ir.Graph, name: str, qparams: QParams, method: Method | None, clip: Clipping) -> None:
    if method == "clip" and clip == "codes":
        _clip_codes(graph, name, qparams, qparams.spec.qmin)
    elif method == "clip":
        clip_values(graph, name, qparams)
    elif clip == "codes":
        _relu_in_codes(graph, name, qparams)


def clip_values(graph: ir.Graph, name: str, qparams: QParams) -> None:
    """Clips a tensor at the ends of its grid; divided by the scale, they are its end codes."""
    value = _value(graph, name)
    readers = list(value.uses())
    low, high = qparams.dequantize(np.array([qparams.spec.qmin, qparams.spec.qmax]))
    ends = [constant(graph, f"{name}.{key}", np.asarray(end)) for key, end in (("low", low), ("high", high))]
    clipped = add_node(graph, "Clip", [value, *ends], f"{name}.clipped")
    for use in readers:
        use.node.replace_input_with(use.idx, clipped)


def _clip_codes(graph: ir.Graph, name: str, qparams: QParams, lowest: int) -> None:
    """Clips a tensor after it is rounded, at one of the grid's codes."""
    spec, codes = qparams.spec, _value(graph, f"{name}.quantized")
    readers = list(codes.uses())
    low = constant(graph, f"{name}.low", np.asarray(lowest + shift_to_top(spec), container_of(spec)))
    clipped = add_node(graph, "Clip", [codes, low], f"{name}.clipped")
    for use in readers:
        use.node.replace_input_with(use.idx, clipped)


def _relu_in_codes(graph: ir.Graph, name: str, qparams: QParams) -> None:
    """Clips codes at zero instead of the values before them.

    ONNX Runtime takes a ReLU between a convolution and its rounding away where the container ends at zero; anywhere
    else it computes both in float.
    """
    value, spec = _value(graph, name), qparams.spec
    relu, zero_point = value.producer(), int(qparams.zero_point)
    if relu is None or relu.op_type != "Relu" or zero_point + shift_to_top(spec) == np.iinfo(container_of(spec)).min:
        return
    (quantize,) = (use.node for use in value.uses())
    quantize.replace_input_with(0, relu.inputs[0])
    graph.remove(relu, safe=True)
    _clip_codes(graph, name, qparams, zero_point)
