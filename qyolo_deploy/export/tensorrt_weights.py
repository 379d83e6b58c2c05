"""TensorRT's weight-only variant: integer weights for size, activations as the float model has them."""

import numpy as np
import onnx_ir as ir

from qyolo_deploy.export.qdq import add_node, constant, dequantize_weight, set_constants, set_float_layer
from qyolo_deploy.export.storage import INT4, raise_opset
from qyolo_deploy.export.tensorrt import Dialect, float_biases
from qyolo_deploy.export.tensorrt_passes import compute_in_half
from qyolo_deploy.quant.model import QuantizedLayer, QuantizedModel


def weight_only_dialect(model: ir.Model, quantized: QuantizedModel, fp16: bool = False) -> Dialect:
    """Makes the graph; the float model is left as it is.

    TensorRT takes 4-bit weights of a convolution as they are, without a detour through int8, but only where its
    activations are float. Nothing is computed in integers, and no activation is rounded: the accuracy is that of the
    weights' grids alone, though training made up for those of the activations as well.

    Args:
        model: From `export_float`.
        quantized: Integers and scales.
        fp16: Convolutions compute in half precision, their weights included.
    """
    result = model.clone()
    raise_opset(result, INT4)
    biases = float_biases(quantized)
    for name, layer in quantized.layers.items():
        weight = _weight(result.graph, name, layer, fp16)
        set_constants(result.graph, name, weight, constant(result.graph, f"{name}.bias_float", biases[name]))
    floats = {key.rpartition(".")[0] for key in quantized.float_tensors}
    for name in floats:
        set_float_layer(result.graph, name, quantized)
    result.graph.sort()
    if fp16:
        compute_in_half(result.graph, [*quantized.layers, *sorted(floats)])
    return Dialect(result, tensors=0, coarser={}, shifted=(), float_layers=(), clips=0)


def _weight(graph: ir.Graph, name: str, layer: QuantizedLayer, fp16: bool) -> ir.Value:
    """The integers, dequantized to the type of their scale."""
    dtype, kind = (np.float16, ir.DataType.FLOAT16) if fp16 else (np.float32, ir.DataType.FLOAT)
    scale = constant(graph, f"{name}.weight_scale", layer.qparams.scale.astype(dtype))
    if INT4.holds(layer.qparams.spec):
        integers = layer.weight.astype(INT4.dtype.numpy())
        packed = constant(graph, f"{name}.weight_quantized", integers, INT4.dtype)
        weight = add_node(graph, "DequantizeLinear", [packed, scale], f"{name}.weight_dequantized", {"axis": 0})
    else:
        weight = dequantize_weight(graph, name, constant(graph, f"{name}.weight_quantized", layer.weight), scale)
    weight.type = ir.TensorType(kind)
    return weight
