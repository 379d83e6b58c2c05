"""TensorRT's weight-only variant: integers of the trained grids, everything else as the float graph has it."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from helpers.engines import run

from qyolo_deploy.engines.tensorrt_build import build_plan
from qyolo_deploy.engines.tensorrt_runtime import import_tensorrt
from qyolo_deploy.engines.tensorrt_spec import BuildSpec, profile
from qyolo_deploy.errors import RuntimeMissingError
from qyolo_deploy.export.tensorrt_weights import weight_only_dialect
from qyolo_deploy.graph.simulate import fold_float
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec
from qyolo_deploy.recipe import TensorRtSection, ValidateSection


@pytest.fixture(scope="module", params=[4, 8])
def weights(request, pico, make_prepared):
    from qyolo_deploy.graph.freeze import freeze

    return freeze(
        make_prepared(pico, QuantScheme(QuantSpec(request.param), QuantSpec(8, signed=False), first_last_bits=8)), {}
    )


@pytest.fixture(scope="module")
def expected(pico, weights, images):
    """The float network with the integers' values as its weights, in torch."""
    view = fold_float(pico)
    for name, layer in weights.layers.items():
        conv = view.core.get_submodule(name)
        conv.weight.data = torch.from_numpy(layer.qparams.dequantize(layer.weight))
        conv.bias.data = torch.from_numpy((layer.bias * weights.bias_scale(name)).astype(np.float32))
    with torch.no_grad():
        return view(images).numpy()


def test_it_computes_the_float_network_with_the_integers_as_weights(float_model, weights, expected, images):
    made = weight_only_dialect(float_model, weights).model
    np.testing.assert_allclose(run(made, images), expected, rtol=1e-4, atol=1e-3)


def test_half_precision_is_near(float_model, weights, expected, images):
    found = run(weight_only_dialect(float_model, weights, fp16=True).model, images)
    assert not np.array_equal(found, expected)
    rounding = len(weights.layers) * 2.0**-11  # of each layer's result, if none cancels another's
    for part in (slice(0, 4), slice(4, None)):
        assert np.linalg.norm((found - expected)[:, part]) < rounding * np.linalg.norm(expected[:, part])


@pytest.mark.parametrize("fp16", [False, True])
def test_weights_of_few_bits_lie_in_four_and_no_activation_is_rounded(float_model, weights, fp16):
    proto = ir.to_proto(weight_only_dialect(float_model, weights, fp16).model)
    onnx.checker.check_model(proto, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    for name, layer in weights.layers.items():
        packed = layer.qparams.spec.bits <= 4
        assert kinds[f"{name}.weight_quantized"] == (onnx.TensorProto.INT4 if packed else onnx.TensorProto.INT8)
    operators = [node.op_type for node in proto.graph.node]
    assert "QuantizeLinear" not in operators
    assert operators.count("DequantizeLinear") == len(weights.layers)


def test_rtx_keeps_the_weights_in_their_bits(float_model, weights, tmp_path):
    try:
        rtx = import_tensorrt("tensorrt_rtx")
    except RuntimeMissingError as error:
        pytest.skip(str(error))
    path = tmp_path / "m.onnx"
    ir.save(weight_only_dialect(float_model, weights, fp16=True).model, path)
    options = TensorRtSection(activations="float")
    spec = BuildSpec(
        name="m",
        scheme="w4",
        onnx=path.name,
        onnx_sha256="0" * 64,
        input="images",
        shapes=profile(options, 64),
        imgsz=64,
        options=options,
        metadata={},
        validation=ValidateSection(),
    )
    built = build_plan(rtx, tmp_path, spec, lambda *step: None)
    packed = sum(layer.weight.size * min(layer.qparams.spec.bits, 8) / 8 for layer in weights.layers.values())
    floats = 2 * sum(layer.weight.size for layer in weights.layers.values())
    assert packed < built.record.weights_bytes < (packed + floats) / 2
