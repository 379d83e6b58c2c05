"""Passes over an OpenVINO model made from a QDQ ONNX: 4-bit files, integers between kernels, reproducible names.

Each pass states what it requires and ensures. None changes what is computed, only which kernel computes it: where that
is another one, a value at a tie may round the other way, and float32 numbers differ in their last digits.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from qyolo_deploy.engines.openvino import import_openvino
from qyolo_deploy.errors import InputError
from qyolo_deploy.quant.model import QuantizedModel

IrPass = Callable[[Any], None]

# The narrowest container of a grid, and what has to be subtracted from its unsigned integers. OpenVINO has no signed
# integers of 3 and 2 bits; the difference is of constants in int8, which the plugin computes at load.
_CONTAINERS = {2: ("u2", 2), 3: ("u3", 4), 4: ("i4", 0)}
_WEIGHT = ".weight_quantized"
_CHANNELS = 1
_LEVELS = 256
_NUMBERED = re.compile(r"(.*?)(_\d+)?", re.DOTALL)


def ir_passes(quantized: QuantizedModel, storage: str) -> tuple[IrPass, ...]:
    """The passes for an engine, in their order.

    Args:
        quantized: What the ONNX was made from.
        storage: `int8`; anything narrower stores weights of at most 4 bits in as many bits, because every OpenVINO
            that engines are built for has integers of 4, 3 and 2.
    """
    bits = {name: layer.qparams.spec.bits for name, layer in quantized.layers.items()}
    narrow = {name: value for name, value in bits.items() if storage != "int8" and value in _CONTAINERS}
    return (round_before_choosing, keep_heads_in_integers, partial(pack_weights, bits=narrow), number_names)


def pack_weights(model: Any, bits: Mapping[str, int]) -> None:
    """Stores weights of few bits as packed constants: `Constant(i4) -> Convert(i8)` in place of `Constant(i8)`.

    The step through int8 is what the plugin folds into the weights of its int8 kernel. Converted to float straight
    away, the convolution would run in float.

    Requires that every layer named has an int8 constant inside its grid. Ensures that it is a packed one.

    Args:
        model: An `openvino.Model`; it is changed.
        bits: Layer name -> width of its grid, 2 to 4.

    Raises:
        InputError: If a layer has no such weights.
    """
    constants = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    for layer, width in bits.items():
        node = constants.get(f"{layer}{_WEIGHT}")
        if node is None or node.get_element_type() != import_openvino().Type.i8:
            raise InputError(f"the OpenVINO model has no int8 weights of '{layer}'")
        _move_readers(node.output(0), _packed(node, width))
    model.validate_nodes_and_infer_types()


def _packed(node: Any, width: int) -> Any:
    """Output of a graph of constants that gives an int8 constant's values."""
    openvino = import_openvino()
    ops = openvino.opset13
    name, values = node.get_friendly_name(), node.data
    container, offset = _CONTAINERS[width]
    limit = 1 << (width - 1)
    if values.size and (values.min() < -limit or values.max() >= limit):
        raise InputError(f"'{name}' does not fit into {width} bits")
    shifted = (values.astype(np.int16) + offset).reshape(-1).tolist()
    # A constant of a numpy buffer would only refer to it; one of a list owns what it holds.
    constant = openvino.op.Constant(getattr(openvino.Type, container), openvino.Shape(values.shape), shifted)
    constant.set_friendly_name(name)
    result = ops.convert(constant, "i8", name=f"{name}_int8")
    if offset:
        zero_point = ops.constant(np.array(offset, np.int8), name=f"{name}_offset")
        result = ops.subtract(result, zero_point, name=f"{name}_signed")
    return result.output(0)


def round_before_choosing(model: Any) -> None:
    """Rounds what goes into Concat, MaxPool and nearest Interpolate instead of what comes out of them.

    These only choose among values, and rounding keeps their order, so the codes are the same (but for ties, see above).
    The importer has it the other way round, which leaves a kernel to requantize each tensor that has another reader,
    besides the rounding that the convolution does anyway.

    Requires and ensures nothing of the graph: where a tensor is not rounded, nothing is moved.
    """
    pending = [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    while pending:
        quantize = pending.pop()
        chooser = quantize.input_value(0).get_node()
        ports = _chosen(chooser)
        if not ports or not _is_per_tensor(quantize) or len(_readers(chooser.output(0))) > 1:
            continue
        for port in ports:
            rounded, is_new = _rounded(port.get_source_output(), quantize)
            port.replace_source_output(rounded.output(0))
            pending += [rounded] if is_new else []
        _move_readers(quantize.output(0), chooser.output(0))
    model.validate_nodes_and_infer_types()


def _chosen(node: Any) -> list[Any]:
    """Input ports among whose values a node chooses; none where it computes."""
    kind = node.get_type_name()
    if kind == "Concat":
        return list(node.inputs())
    is_nearest = kind == "Interpolate" and node.get_attributes().get("mode") == "nearest"
    return node.inputs()[:1] if kind == "MaxPool" or is_nearest else []


def _rounded(source: Any, like: Any) -> tuple[Any, bool]:
    """The FakeQuantize with the ranges of another on a tensor, and whether it had to be made."""
    candidates = [source.get_node(), *(port.get_node() for port in _readers(source))]
    for node in candidates:
        if node.get_type_name() == "FakeQuantize" and _ranges(node) == _ranges(like):
            return node, False
    ops = import_openvino().opset13
    ends = [like.input_value(index) for index in range(1, 5)]
    name = f"{source.get_node().get_friendly_name()}/rounded"
    return ops.fake_quantize(source, *ends, like.get_levels(), name=name), True


def _is_per_tensor(quantize: Any) -> bool:
    ends = [quantize.input_value(index).get_node() for index in range(1, 5)]
    return all(end.get_type_name() == "Constant" and end.data.size == 1 for end in ends)


def _ranges(quantize: Any) -> tuple[float, ...] | None:
    """Input and output range and levels; None where they are not per tensor, which equals no other."""
    if not _is_per_tensor(quantize):
        return None
    ends = [float(quantize.input_value(index).get_node().data.item()) for index in range(1, 5)]
    return (*ends, quantize.get_levels())


def keep_heads_in_integers(model: Any) -> None:
    """Puts head maps into planes while they are still of 8 bits.

    Convolutions write the channels of a cell side by side, decode and readers of raw maps want planes. Left alone, the
    plugin cuts slices out of the former byte by byte, or dequantizes first and reorders four times the bytes. Flattened
    to `[N, C, H * W]`, a map is reordered as it is.

    Requires nothing: maps that are rounded to 8 bits and then only sliced, or are an output, are flattened. Ensures
    that outputs keep names, order and shapes.
    """
    for quantize in [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]:
        if quantize.get_output_partial_shape(0).rank.get_length() != 4 or not _is_per_tensor(quantize):
            continue
        readers = _readers(quantize.output(0))
        if readers and all(_slices_channels(port.get_node()) for port in readers):
            _slice_planes(quantize, readers)
        elif [port.get_node().get_type_name() for port in readers] == ["Result"] and quantize.get_levels() == _LEVELS:
            _dequantize_planes(quantize, readers[0])
    model.validate_nodes_and_infer_types()


def _slices_channels(node: Any) -> bool:
    if node.get_type_name() != "Slice" or len(node.inputs()) < 5:
        return False
    axes = node.input_value(4).get_node()
    is_known = axes.get_type_name() == "Constant"
    # A slice of planes may only be read as planes, because its rank is another.
    reads_planes = all(port.get_node().get_type_name() == "Reshape" for port in _readers(node.output(0)))
    return is_known and axes.data.tolist() == [_CHANNELS] and reads_planes


def _slice_planes(quantize: Any, readers: list[Any]) -> None:
    planes = _flattened(quantize)
    for port in readers:
        port.replace_source_output(planes)


def _dequantize_planes(quantize: Any, result: Any) -> None:
    """Integers, reordered as planes, and only then `(q - z) * s`, without which the two reshapes would cancel out."""
    ops, name = import_openvino().opset13, quantize.get_friendly_name()
    low, high = (float(quantize.input_value(index).get_node().data.item()) for index in (3, 4))
    scale = (high - low) / (_LEVELS - 1)
    ends = [ops.constant(np.full((1, 1, 1, 1), end, np.float32)) for end in (0, _LEVELS - 1)]
    source = quantize.input_value(0)
    codes = ops.fake_quantize(source, *(quantize.input_value(i) for i in (1, 2)), *ends, _LEVELS, name=f"{name}/codes")
    zero_point = ops.constant(np.full((1, 1, 1), round(-low / scale), np.float32))
    shifted = ops.subtract(_flattened(codes), zero_point, name=f"{name}/shifted")
    planes = ops.multiply(shifted, ops.constant(np.full((1, 1, 1), scale, np.float32)), name=f"{name}/scaled")
    shape = ops.shape_of(codes, name=f"{name}/shape")
    names = quantize.output(0).get_names()
    quantize.output(0).set_names(set())
    restored = ops.reshape(planes, shape, False, name=f"{name}/restored")
    restored.output(0).set_names(names)
    result.replace_source_output(restored.output(0))


def _flattened(node: Any) -> Any:
    ops = import_openvino().opset13
    pattern = ops.constant(np.array([0, 0, -1], np.int64))
    return ops.reshape(node, pattern, True, name=f"{node.get_friendly_name()}/planes").output(0)


def number_names(model: Any) -> None:
    """Numbers names anew in graph order: the importer takes numbers from a counter of the whole process.

    Ensures that a model gives the same bytes whatever the process has built before.
    """
    counts: Counter[str] = Counter()
    numbered = []
    for node in model.get_ordered_ops():
        base, number = _NUMBERED.fullmatch(node.get_friendly_name()).groups()  # type: ignore[union-attr]
        if number is None:
            counts[base] += 1  # so that the second `conv` is `conv_1`
        elif node.get_type_name() not in ("Parameter", "Result"):
            numbered.append((node, base))
    for node, base in numbered:
        node.set_friendly_name(f"{base}_{counts[base]}")
        counts[base] += 1


def _readers(output: Any) -> list[Any]:
    """Input ports that read an output."""
    return list(output.get_target_inputs())


def _move_readers(old: Any, new: Any) -> None:
    for port in _readers(old):
        port.replace_source_output(new)
