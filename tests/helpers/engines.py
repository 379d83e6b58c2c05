"""Exported graphs as ONNX Runtime computes them, and their integers beside those of the simulation."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper

from qyolo_deploy.engines.onnxruntime import session_options
from qyolo_deploy.export.saturation import shift_to_top
from qyolo_deploy.graph.simulate import FixedQuantizer, IntegerAdd, IntegerConv, IntegerMul, IntegerSigmoid

# The view breaks ties as ONNX Runtime does, as far as we have seen; a code that turned early would move many of those
# behind it.
DIFFERING_CODES = 1e-3

_INTEGER = (IntegerConv, IntegerAdd, IntegerMul, IntegerSigmoid, FixedQuantizer)


def to_bytes(model):
    return ir.to_proto(model).SerializeToString()


def session_of(model, path=None):
    options = session_options()
    if path is not None:
        options.optimized_model_filepath = str(path)
    data = model if isinstance(model, bytes) else to_bytes(model)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model, images):
    return session_of(model).run(None, {"images": np.asarray(images)})[0]


def optimised(model, tmp_path):
    """The graph that ONNX Runtime executes."""
    session_of(model, tmp_path / "optimised.onnx")
    return onnx.load(tmp_path / "optimised.onnx").graph


def codes_of_simulation(view, quantized, images):
    """Every quantized tensor of the fake-quantized view as its integers, and the output."""
    codes, handles = {}, []
    for name, module in view.core.named_modules():
        tensor = name.removeprefix("quantizers.")
        if isinstance(module, _INTEGER) and tensor in quantized.activations:
            qparams = quantized.activations[tensor]

            def keep(_, inputs, output, tensor=tensor, qparams=qparams):
                codes[tensor] = qparams.quantize(output.numpy())

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        output = view(images).numpy()
    for handle in handles:
        handle.remove()
    return codes, output


def compare_codes(model, quantized, view, images):
    """Share of differing codes among all tensors, the largest difference in levels, and both outputs."""
    proto = ir.to_proto(model)
    makers = {name: node for node in proto.graph.node for name in node.output}
    names = [makers[f"{name}.dequantized"].input[0] for name in quantized.activations]
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in names)
    output, *found = session_of(proto.SerializeToString()).run(None, {"images": images.numpy()})
    np.testing.assert_array_equal(output, run(model, images))  # looking inside has not changed the computation
    codes, expected = codes_of_simulation(view, quantized, images)
    differences = [
        np.abs(ours.astype(np.int32) - shift_to_top(grid.spec) - codes[name])
        for (name, grid), ours in zip(quantized.activations.items(), found, strict=True)
    ]
    count = sum(difference.size for difference in differences)
    share = sum((difference > 0).sum() for difference in differences) / count
    return share, max(difference.max() for difference in differences), output, expected


def assert_same_codes(model, quantized, view, images):
    share, worst, output, expected = compare_codes(model, quantized, view, images)
    assert share <= DIFFERING_CODES
    if worst == 0:  # the rest is the decode, in float in both
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-3)
