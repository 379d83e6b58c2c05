"""Detectors with attention (YOLO11 and its successors): every convolution in integers, in both runtimes."""

from collections import Counter

import onnx_ir as ir
import pytest
from helpers.engines import compare_codes, optimised

from qyolo_deploy.engines.openvino import _core, build_openvino
from qyolo_deploy.engines.openvino_kernels import executed_kernels
from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.export.heads import expose_heads
from qyolo_deploy.export.openvino_passes import ir_passes
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.simulate import fold_float, simulate
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

# What is new in YOLO11 and YOLO12: C3k2, attention of both kinds, convolutions of single channels in the head.
TINY_ATTENTION = """
nc: 3
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C3k2, [32, True]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, {kind}]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, C2PSA, [128]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 4], 1, Concat, [1]]
  - [-1, 1, C3k2, [64, False]]
  - [[9, 6], 1, Detect, [nc]]
"""
KINDS = {"c2psa": "C3k2, [64, False]", "a2c2f": "A2C2f, [64, True, 4]"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=KINDS)
def detector(request, make_detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("attention") / "tiny.yaml"
    path.write_text(TINY_ATTENTION.replace("{kind}", KINDS[request.param]), encoding="utf-8")
    return make_detector(str(path))


@pytest.fixture(scope="module")
def model(detector):
    return export_float(fold_float(detector), 64, dynamic=True)


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 4)])
def test_convolutions_run_in_integers_and_as_simulated(
    detector, model, make_prepared, images, tmp_path, weights, activations
):
    """Products and softmax of attention stay float; what their results are rounded to is the same all the same."""
    prepared = make_prepared(detector, QuantScheme(QuantSpec(weights), QuantSpec(activations, signed=False)))
    quantized = freeze(prepared, {})
    assert not quantized.float_tensors
    qdq = insert_qdq(model, quantized)
    kinds = Counter(node.op_type for node in optimised(qdq, tmp_path).node)
    assert kinds["QLinearConv"] == len(quantized.layers) and kinds["Conv"] == 0
    assert kinds["Softmax"] > 0
    share, *_ = compare_codes(qdq, quantized, simulate(detector, quantized), images)
    assert share == 0

    inner = prepared.placement.inner if activations == 8 else frozenset()
    raw = insert_qdq(expose_heads(model, fold_float(detector)), quantized, leave_out=inner, clip="values")
    ir.save(raw, tmp_path / "source.onnx")
    build_openvino(tmp_path / "source.onnx", tmp_path, "model", {}, ir_passes(quantized, "int8"))
    compiled = _core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kernels = executed_kernels(compiled)
    convolutions = [kernel for kernel in kernels if kernel.kind == "Convolution"]
    assert len(convolutions) == len(quantized.layers)
    assert all(kernel.is_integer for kernel in convolutions)
