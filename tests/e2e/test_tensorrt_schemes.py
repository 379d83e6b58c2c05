"""The build check: TensorRT-RTX, which needs no GPU, builds every scheme and keeps the weights in 8 bits."""

import onnx_ir as ir
import pytest

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.engines.tensorrt_build import build_plan
from qyolo_deploy.engines.tensorrt_runtime import import_tensorrt
from qyolo_deploy.engines.tensorrt_spec import BuildSpec, profile
from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.export.tensorrt import tensorrt_dialect
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.prepare import prepare
from qyolo_deploy.graph.simulate import fold_float
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec
from qyolo_deploy.recipe import TensorRtSection, ValidateSection

IMGSZ = 64
SCHEMES = {  # bits of weights and activations, and whether the latter are around 0
    "w8a8": (8, 8, False),
    "w4a8": (4, 8, False),
    "w4a4": (4, 4, False),
    "w3a3": (3, 3, False),
    "w8a8_symmetric": (8, 8, True),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory):
    """Function from a graph to what the builder's log says that its weights take, in bytes."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    rtx, options = import_tensorrt("tensorrt_rtx"), TensorRtSection()

    def build(model, name):
        folder = tmp_path_factory.mktemp(name)
        onnx = folder / f"{name}.onnx"
        ir.save(model, onnx)
        spec = BuildSpec(
            name=name,
            scheme=name,
            onnx=onnx.name,
            onnx_sha256=sha256_file(onnx),
            input="images",
            shapes=profile(options, IMGSZ),
            imgsz=IMGSZ,
            options=options,
            metadata={},
            validation=ValidateSection(),
        )
        return build_plan(rtx, folder, spec, lambda *step: None).record.weights_bytes

    return build


@pytest.fixture(scope="module", params=["yolov5", "yolo11n"])
def network(request, make_detector, weights_of):
    """A detector, its float graph, and what the weights of that take."""
    detector = make_detector(request.param)
    model = export_float(fold_float(detector), IMGSZ, dynamic=True)
    return request.param, detector, model, weights_of(model, f"{request.param}_fp32")


@pytest.mark.parametrize("label", SCHEMES)
def test_every_scheme_is_built_with_weights_of_8_bits(network, weights_of, images, label):
    from conftest import set_ranges

    (name, detector, model, float_bytes), (weights, activations, signed) = network, SCHEMES[label]
    scheme = QuantScheme(QuantSpec(weights), QuantSpec(activations, signed=signed))
    prepared = prepare(detector, scheme, inside_activations=False).eval()
    set_ranges(prepared, images)
    integers = freeze(prepared, {})
    dialect = tensorrt_dialect(model, integers, fp16=True)
    found = weights_of(dialect.model, f"{name}_{label}")
    in_8_bits = sum(layer.weight.size for layer in integers.layers.values())
    assert float_bytes > 4 * in_8_bits  # biases and the constants of decoding come on top
    # So do, here, scales of 32 bits and the first layer in half precision; kernels pad channels. In half precision the
    # weights alone would take twice as much.
    assert in_8_bits <= found < 2 * in_8_bits
