"""The arithmetic of the fake-quantized view beside the kernels of ONNX Runtime, code by code."""

import numpy as np
import pytest
import torch
from helpers.engines import session_of
from onnx import TensorProto, helper, numpy_helper

from qyolo_deploy.graph.simulate import IntegerAdd, IntegerMul, IntegerSigmoid
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantSpec

UINT8 = QuantSpec(8, signed=False)


def kernel(operator, grids, names, codes):
    """What an operator of com.microsoft makes of uint8 codes; the last grid is the output's."""
    inputs = list(names[: len(grids) - 1])
    words = [word for name in names for word in (name, f"{name}s", f"{name}z")]
    output = names[-1]
    node = helper.make_node(operator, [word for word in words if word != output], [output], domain="com.microsoft")
    constants = [
        numpy_helper.from_array(np.array(value), f"{name}{kind}")
        for name, (scale, zero) in zip(names, grids, strict=True)
        for kind, value in (("s", scale), ("z", zero))
    ]
    length = [len(codes[0])]
    graph = helper.make_graph(
        [node],
        operator,
        [helper.make_tensor_value_info(name, TensorProto.UINT8, length) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.UINT8, length)],
        constants,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return session_of(model.SerializeToString()).run(None, dict(zip(inputs, codes, strict=True)))[0]


def values_of(codes, grid):
    scale, zero = grid
    return torch.from_numpy((codes.astype(np.float32) - zero) * scale)


@pytest.mark.parametrize(("module", "operator"), [(IntegerAdd, "QLinearAdd"), (IntegerMul, "QLinearMul")])
def test_ties_break_as_in_onnxruntime(module, operator):
    """All 65,536 pairs of codes, with scales like those of a trained network."""
    rng = np.random.default_rng(4)
    codes = [np.repeat(np.arange(256, dtype=np.uint8), 256), np.tile(np.arange(256, dtype=np.uint8), 256)]
    for index in range(40):
        scales, zeros = rng.uniform(0.01, 0.2, 3).astype(np.float32), rng.integers(0, 120, 3).astype(np.uint8)
        if module is IntegerMul and index % 2:  # SiLU: the gate's grid, and a product that fills its own
            scales[1], zeros[1], scales[2] = 1 / 256, 0, scales[0] * rng.uniform(0.3, 1.0)
        grids = list(zip(scales, zeros, strict=True))
        terms = [QParams.of(UINT8, scale, zero) for scale, zero in grids]
        values = [values_of(code, grid) for code, grid in zip(codes, grids, strict=False)]
        ours = terms[2].quantize(module((terms[0], terms[1]), terms[2])(*values).numpy())
        np.testing.assert_array_equal(ours, kernel(operator, grids, "abc", codes))


def test_a_sigmoid_is_that_of_onnxruntime_s_table():
    """All codes, with the gate's grid and with others, on which some sigmoids lie beside a tie."""
    rng = np.random.default_rng(5)
    codes = np.arange(256, dtype=np.uint8)
    for index in range(300):
        source = np.float32(rng.uniform(0.005, 0.3)), np.uint8(rng.integers(0, 256))
        target = np.float32(1 / 256 if index % 2 else rng.uniform(1 / 256, 1 / 100)), np.uint8(0)
        grids = [QParams.of(UINT8, *grid) for grid in (source, target)]
        ours = grids[1].quantize(IntegerSigmoid(*grids)(values_of(codes, source)).numpy())
        np.testing.assert_array_equal(ours, kernel("QLinearSigmoid", [source, target], "xy", [codes]))
