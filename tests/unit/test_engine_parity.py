"""Engines beside an independent integer reference and the fake-quantized view, every remaining difference explained.

What could differ, and what the tests show of it:

* Biases are the same int32 numbers everywhere, and products of integers are summed exactly: no difference.
* A sum times its scales is rounded to float32 by the kernels, in one order by ONNX Runtime (`s_x * s_w / s_y` first)
  and in another by OpenVINO (a division by the scale of the output becomes a product with its reciprocal). So is what a
  sigmoid, a product or a sum of two tensors gives. A value within `TIE` of the middle between two codes may therefore
  get either. Nothing else does: given the inputs that the engine itself had, each of its codes is the nearest one.
* All tensors before the first such tie have the very codes of the reference. Behind it the difference spreads: with
  8-bit activations one code in millions reaches a tenth of the codes of a head map, with few bits it is mostly lost.
* The fake-quantized view computes as ONNX Runtime does, so between these two there is no tie left. OpenVINO does not
  round inside SiLU where activations have 8 bits; the reference reads that from the graph that the engine is made of.
* x86 processors without VNNI add two products in 16 bits, which saturate. With `reduce_range` none can; without it ONNX
  Runtime takes other kernels, as our options tell it, and OpenVINO has none.
"""

import math

import numpy as np
import onnx_ir as ir
import pytest
import torch
from helpers.engines import codes_of_simulation, session_of
from helpers.integer_reference import IntegerReference
from helpers.parity import assert_explained, openvino_run
from onnx import TensorProto, helper

from qyolo_deploy.artifact import saturates_products
from qyolo_deploy.engines.openvino import build_openvino
from qyolo_deploy.export.openvino_passes import ir_passes
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.export.saturation import shift_to_top
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.simulate import simulate
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

SCHEMES = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w3a3": (3, 3), "w2a4": (2, 4)}
# Of head maps, over all images; measured are 36 dB and more, and no difference at all in most.
HEAD_SQNR_DB = 30.0
REAL_IMAGES = 16


def frozen(detector, make_prepared, images, scheme, reduce_range=True):
    """The integers of a scheme, and what lies inside activations; with few bits, some ranges clip the low end."""
    weights, activations = SCHEMES[scheme]
    grids = QuantSpec(weights), QuantSpec(activations, signed=False)
    prepared = make_prepared(detector, QuantScheme(*grids, reduce_range=reduce_range), images)
    if activations < 8:
        narrow = [quantizer for quantizer in prepared.quantizers().values() if quantizer.spec.bits < 8]
        with torch.no_grad():
            for quantizer in narrow[::2]:
                quantizer.scale.mul_(0.3)
                quantizer.offset.zero_()
    return freeze(prepared, {}), prepared.placement.inner


def onnxruntime_codes(model):
    """The reference of a QDQ graph, and a function from images to the codes that ONNX Runtime computes."""
    proto = ir.to_proto(model)
    reference, names = IntegerReference(proto), {}
    for name, node in reference.rounded.items():
        names[name] = node.input[0]
        proto.graph.output.append(helper.make_tensor_value_info(node.input[0], TensorProto.UINT8, None))
    session = session_of(proto.SerializeToString())

    def run(images):
        found = session.run(list(names.values()), {"images": images})
        return {name: codes.astype(np.int32) for name, codes in zip(names, found, strict=True)}

    return reference, run


def openvino_codes(model, quantized, folder):
    """The same for OpenVINO with the passes of a build."""
    folder.mkdir()
    ir.save(model, folder / "source.onnx")
    build_openvino(folder / "source.onnx", folder, "model", {}, ir_passes(quantized, "int2"))
    reference = IntegerReference(ir.to_proto(model))
    return reference, openvino_run(folder / "model.xml", reference)


class HeadNoise:
    """SQNR of raw head maps over images, map by map."""

    def __init__(self, reference, heads):
        self._reference, self._sums = reference, {name: [0.0, 0.0] for name in heads}

    def add(self, codes, others):
        for name, sums in self._sums.items():
            _, zero_point, _, _ = self._reference.grid(name)
            steps, other = (side[name].astype(np.float64) - zero_point for side in (codes, others))
            sums[0] += (other**2).sum()
            sums[1] += ((steps - other) ** 2).sum()

    def worst_db(self):
        return min(10 * math.log10(signal / noise) if noise else math.inf for signal, noise in self._sums.values())


def heads_of(view):
    """Names of the convolutions that make the raw maps."""
    (maps,) = view.core.graph.output_node().args
    return [str(node.target).removeprefix("quantizers.") for node in maps]


def assert_onnxruntime_parity(detector, float_graph, quantized, images):
    view = simulate(detector, quantized)
    reference, run = onnxruntime_codes(insert_qdq(float_graph, quantized, storage="int2"))
    noise = HeadNoise(reference, heads_of(view))
    for image in images:
        codes = run(image[None].numpy())
        simulated, _ = codes_of_simulation(view, quantized, image[None])
        for name, grid in quantized.activations.items():
            np.testing.assert_array_equal(codes[name] - shift_to_top(grid.spec), simulated[name], err_msg=name)
        noise.add(codes, assert_explained(reference, codes, image[None].numpy()))
    assert noise.worst_db() >= HEAD_SQNR_DB


def assert_openvino_parity(detector, float_graph, quantized, inner, images, folder):
    is_fine = all(grid.spec.bits == 8 for grid in quantized.activations.values())
    left_out = inner if is_fine else frozenset()
    view = simulate(detector, quantized, left_out)
    qdq = insert_qdq(float_graph, quantized, leave_out=left_out, clip="values")
    reference, run = openvino_codes(qdq, quantized, folder)
    heads = heads_of(view)
    to_reference, to_view = HeadNoise(reference, heads), HeadNoise(reference, heads)
    for image in images:
        codes = run(image[None].numpy())
        assert set(heads) <= set(codes) and len(codes) > 0.75 * len(set(quantized.activations) - left_out)
        to_reference.add(codes, assert_explained(reference, codes, image[None].numpy()))
        simulated, _ = codes_of_simulation(view, quantized, image[None])
        shifts = {name: shift_to_top(quantized.activations[name].spec) for name in heads}
        to_view.add(codes, {name: simulated[name] + shift for name, shift in shifts.items()})
    assert min(to_reference.worst_db(), to_view.worst_db()) >= HEAD_SQNR_DB


@pytest.mark.parametrize("scheme", SCHEMES)
def test_onnxruntime(scheme, pico, float_model, make_prepared, images):
    quantized, _ = frozen(pico, make_prepared, images, scheme, reduce_range=False)
    assert quantized.wide_layers
    assert_onnxruntime_parity(pico, float_model, quantized, images)


@pytest.mark.skipif(saturates_products(), reason="no VNNI: OpenVINO's kernels saturate with weights of full range")
def test_openvino_with_weights_of_full_range(pico, float_model, make_prepared, images, tmp_path):
    quantized, inner = frozen(pico, make_prepared, images, "w8a8", reduce_range=False)
    assert_openvino_parity(pico, float_model, quantized, inner, images, tmp_path / "engine")


@pytest.mark.parametrize("scheme", ["w8a8", pytest.param("w3a3", marks=pytest.mark.slow)])
def test_openvino(scheme, pico, float_model, make_prepared, images, tmp_path):
    quantized, inner = frozen(pico, make_prepared, images, scheme)
    assert_openvino_parity(pico, float_model, quantized, inner, images, tmp_path / "engine")


@pytest.fixture(scope="module")
def real_images(data_root):
    """float32 `[16, 3, 160, 160]`, of COCO's validation split."""
    from qyolo_deploy.data.dataset import load_dataset
    from qyolo_deploy.data.images import read_image
    from qyolo_deploy.data.letterbox import letterbox, to_tensor

    records = load_dataset(data_root / "coco-subset", "val").images[:REAL_IMAGES]
    assert len(records) == REAL_IMAGES
    padded = [letterbox(read_image(record.path), 160, rect=False)[0] for record in records]
    return torch.from_numpy(np.concatenate([to_tensor(image) for image in padded]))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_onnxruntime_on_real_images(scheme, official, make_prepared, real_images):
    detector, _, float_graph = official
    quantized, _ = frozen(detector, make_prepared, real_images, scheme)
    assert_onnxruntime_parity(detector, float_graph, quantized, real_images)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_openvino_on_real_images(scheme, official, make_prepared, real_images, tmp_path):
    detector, _, float_graph = official
    quantized, inner = frozen(detector, make_prepared, real_images, scheme)
    assert_openvino_parity(detector, float_graph, quantized, inner, real_images, tmp_path / "engine")


def test_the_reference_is_not_blind(pico, float_model, make_prepared, images):
    """A bias that is one step off, which is far less than a code, is no tie."""
    quantized, _ = frozen(pico, make_prepared, images, "w8a8")
    reference, run = onnxruntime_codes(insert_qdq(float_model, quantized))
    name = "model.2.cv1.conv"
    bias = reference.constants[f"{name}.bias_quantized"]
    reference.constants[f"{name}.bias_quantized"] = bias + 1
    image = images[:1].numpy()
    with pytest.raises(AssertionError, match=name):
        assert_explained(reference, run(image), image)
