"""The passes over OpenVINO models: packed weights, fused kernels, maps in planes, bytes that do not change."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir
import openvino
import pytest
import torch
from helpers.integer_reference import IntegerReference
from helpers.parity import assert_explained, openvino_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qyolo_deploy.engines.kernels import kernel_table
from qyolo_deploy.engines.openvino import OpenVinoRunner, _core, build_openvino
from qyolo_deploy.engines.openvino_kernels import executed_kernels, profile_kernels
from qyolo_deploy.errors import InputError
from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.export.heads import expose_heads
from qyolo_deploy.export.openvino_passes import (
    ir_passes,
    keep_heads_in_integers,
    pack_weights,
    round_before_choosing,
)
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.simulate import fold_float
from qyolo_deploy.models.registry import with_activation

ops = openvino.opset13
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}


def write(model, folder, passes=()):
    """Builds an engine from a QDQ or float graph."""
    folder.mkdir()
    ir.save(model, folder / "source.onnx")
    build_openvino(folder / "source.onnx", folder, "model", {}, passes)
    return folder / "model.xml"


def compiled(xml, **options):
    return _core().compile_model(_core().read_model(xml), "CPU", OPTIONS | options)


def outputs(xml, images):
    return list(compiled(xml)(np.asarray(images)).values())


def element_types(xml):
    """Element types of the convolutions' weights as they are stored, by layer."""
    stored = {}
    for node in _core().read_model(xml).get_ops():
        layer, found, _ = node.get_friendly_name().partition(".weight_quantized")
        if node.get_type_name() == "Constant" and found and node.get_output_shape(0):
            stored[layer] = node.get_element_type().to_string()
    return stored


def bytes_of(xml):
    return xml.read_bytes(), xml.with_suffix(".bin").read_bytes()


def bin_size(xml):
    return xml.with_suffix(".bin").stat().st_size


def assert_near(ours, theirs):
    """Equal but for what a few values at a tie, rounded by another kernel, make of themselves."""
    for left, right in zip(ours, theirs, strict=True):
        assert np.abs(left - right).mean() <= 0.01 * right.std()


def number_of(xml, kind):
    return sum(kernel.kind == kind for kernel in executed_kernels(compiled(xml)))


@pytest.fixture(scope="module")
def engines(float_model, quantized, tmp_path_factory):
    """`pico` W4A8 in both storages, and without any pass."""
    folder, qdq = tmp_path_factory.mktemp("engines"), insert_qdq(float_model, quantized, clip="values")
    built = {storage: write(qdq, folder / storage, ir_passes(quantized, storage)) for storage in ("int8", "int4")}
    return built | {"plain": write(qdq, folder / "plain")}


# --- packing ---


def weights_model(values):
    constant = openvino.op.Constant(values)
    constant.set_friendly_name("layer.weight_quantized")
    return openvino.Model([ops.convert(constant, "f32")], [], "weights")


def unpacked(data, width, count):
    """Integers of `width` bits, the first in the lowest bits of the first byte."""
    bits = np.unpackbits(np.ascontiguousarray(data).view(np.uint8), bitorder="little")[: count * width]
    return bits.reshape(count, width) @ (1 << np.arange(width))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), width=st.sampled_from([2, 3, 4]))
def test_packed_weights_come_back(data, width, tmp_path):
    limit = 1 << (width - 1)
    shape = data.draw(arrays.array_shapes(min_dims=4, max_dims=4, max_side=5))
    values = data.draw(arrays.arrays(np.int8, shape, elements=st.integers(-limit, limit - 1)))
    model = weights_model(values)
    pack_weights(model, {"layer": width})
    openvino.save_model(model, tmp_path / "m.xml", compress_to_fp16=False)
    read = _core().read_model(tmp_path / "m.xml")
    (stored,) = [node for node in read.get_ops() if node.get_friendly_name() == "layer.weight_quantized"]
    assert stored.get_element_type().to_string() == {2: "u2", 3: "u3", 4: "i4"}[width]
    if width != 3:  # whose bits lie in two places
        codes = unpacked(stored.data, width, values.size)
        codes = np.where(codes >= limit, codes - 2 * limit, codes) if width == 4 else codes - limit
        np.testing.assert_array_equal(codes.reshape(shape), values)
    np.testing.assert_array_equal(_core().compile_model(read, "CPU")([])[0], values)


@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        (np.full((1, 1, 1, 1), 8, np.int8), {"layer": 4}, "does not fit into 4 bits"),
        (np.full((1, 1, 1, 1), -3, np.int8), {"layer": 2}, "does not fit into 2 bits"),
        (np.zeros((1, 1, 1, 1), np.int8), {"other": 4}, "no int8 weights of 'other'"),
        (np.zeros((1, 1, 1, 1), np.float32), {"layer": 4}, "no int8 weights of 'layer'"),
    ],
)
def test_what_cannot_be_packed_is_refused(values, bits, message):
    with pytest.raises(InputError, match=message):
        pack_weights(weights_model(values), bits)


def test_weights_lie_in_four_bits(engines, quantized):
    bits = {name: layer.qparams.spec.bits for name, layer in quantized.layers.items()}
    assert element_types(engines["int4"]) == {name: "i4" if width == 4 else "i8" for name, width in bits.items()}
    assert set(element_types(engines["int8"]).values()) == {"i8"}
    packed = sum(quantized.layers[name].weight.size for name, width in bits.items() if width == 4)
    assert bin_size(engines["int8"]) - bin_size(engines["int4"]) == pytest.approx(packed / 2, abs=64 * len(bits))


def test_packed_weights_run_in_integers_and_give_the_same(engines, images, quantized):
    kernels = {key: executed_kernels(compiled(xml)) for key, xml in engines.items()}
    for found in kernels.values():
        convolutions = [kernel for kernel in found if kernel.kind == "Convolution"]
        assert len(convolutions) == len(quantized.layers)
        assert all(kernel.is_integer for kernel in convolutions)
    assert kernel_table(kernels["int4"]) == kernel_table(kernels["int8"])
    assert_near(outputs(engines["int8"], images), outputs(engines["plain"], images))
    np.testing.assert_array_equal(outputs(engines["int4"], images), outputs(engines["int8"], images))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "container"), [(3, "u3"), (2, "u2")])
def test_narrower_grids_have_narrower_containers(
    float_model, pico, make_prepared, make_scheme, images, width, container, tmp_path
):
    quantized = freeze(make_prepared(pico, make_scheme(width)), {})
    qdq = insert_qdq(float_model, quantized, clip="values")
    eight, packed = (write(qdq, tmp_path / storage, ir_passes(quantized, storage)) for storage in ("int8", "int4"))
    stored = Counter(element_types(packed).values())
    assert stored[container] == sum(layer.qparams.spec.bits == width for layer in quantized.layers.values()) > 50
    found = [kernel for kernel in executed_kernels(compiled(packed)) if kernel.kind == "Convolution"]
    assert all(kernel.is_integer for kernel in found)
    np.testing.assert_array_equal(outputs(packed, images), outputs(eight, images))


def test_the_bytes_are_the_same_after_other_builds(float_model, quantized, engines, tmp_path):
    """The importer numbers names from a counter of the process."""
    qdq = insert_qdq(float_model, quantized, clip="values")
    again = write(qdq, tmp_path / "again", ir_passes(quantized, "int4"))
    assert bytes_of(again) == bytes_of(engines["int4"])
    names = [node.get_friendly_name() for node in _core().read_model(again).get_ops()]
    assert len(set(names)) == len(names)


def test_layers_that_are_not_there_are_told(float_model, quantized, tmp_path):
    renamed = replace(
        quantized,
        layers={f"{name}x" if index == 3 else name: v for index, (name, v) in enumerate(quantized.layers.items())},
    )
    qdq = insert_qdq(float_model, quantized, clip="values")
    with pytest.raises(InputError, match="no int8 weights of"):
        write(qdq, tmp_path / "engine", ir_passes(renamed, "int4"))


# --- fused kernels ---


def plain_and_passed(model, quantized, left_out, passes, folder):
    qdq = insert_qdq(model, quantized, leave_out=left_out, clip="values")
    return write(qdq, folder / "plain"), write(qdq, folder / "passed", passes)


@pytest.mark.slow
def test_the_official_network_is_convolutions_and_copies(official, make_prepared, photographs, tmp_path):
    """Nothing is computed between the image and the decode but fused kernels in 8 bits."""
    detector, quantized, model = official
    inner = make_prepared(detector).placement.inner
    raw = expose_heads(model, fold_float(detector))
    plain, passed = plain_and_passed(raw, quantized, inner, ir_passes(quantized, "int8"), tmp_path)
    kernels = executed_kernels(compiled(passed))
    kinds = Counter(kernel.kind for kernel in kernels)
    assert set(kinds) == {"Convolution", "Concatenation", "Pooling", "Interpolate", "Reorder", "Subgraph"}
    # Neither SiLU nor rounding has a kernel of its own; only the image is rounded, and the maps made float.
    alone = [kernel for kernel in kernels if kernel.kind == "Subgraph"]
    assert sorted(kernel.name.partition(".")[0].partition("/")[0] for kernel in alone) == [
        "DequantizeLinear:images",
        *("head0", "head1", "head2"),
    ]
    assert all(kernel.is_integer for kernel in kernels if kernel not in alone)
    convolutions = [kernel for kernel in kernels if kernel.kind == "Convolution"]
    with_silu = [kernel for kernel in convolutions if any("mul" in part for part in kernel.fused)]
    assert len(convolutions) == 60 and len(with_silu) == 57
    assert number_of(plain, "Subgraph") > 10
    for image in photographs.numpy():
        assert_near(outputs(passed, image[None]), outputs(plain, image[None]))


def test_decoded_maps_are_sliced_as_planes(official, make_prepared, photographs, tmp_path):
    detector, quantized, model = official
    inner = make_prepared(detector).placement.inner
    plain, passed = plain_and_passed(model, quantized, inner, (keep_heads_in_integers,), tmp_path)
    for image in photographs.numpy():
        np.testing.assert_array_equal(outputs(passed, image[None]), outputs(plain, image[None]))
    before, after = ({node.get_type_name() for node in readers_of_maps(xml)} for xml in (plain, passed))
    assert (before, after) == ({"Slice"}, {"Reshape"})


def readers_of_maps(xml):
    """What reads the rounded outputs of the last convolutions."""
    for node in _core().read_model(xml).get_ops():
        if node.get_type_name() == "FakeQuantize" and list(node.get_output_shape(0))[1] == 255:
            yield from (port.get_node() for port in node.output(0).get_target_inputs())


def test_grids_of_few_bits_stay(float_model, pico, make_prepared, make_scheme, images, tmp_path):
    """Their values are clipped before they are rounded, and joined from tensors of other grids."""
    prepared = make_prepared(pico, make_scheme(4, 3))
    with torch.no_grad():
        for quantizer in [quantizer for quantizer in prepared.quantizers().values() if quantizer.spec.bits < 8][::2]:
            quantizer.scale.mul_(0.3)
            quantizer.offset.zero_()
    plain, passed = plain_and_passed(float_model, freeze(prepared, {}), frozenset(), (round_before_choosing,), tmp_path)
    assert_near(outputs(passed, images), outputs(plain, images))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pico", "yolov5"])
def test_raw_maps_keep_names_order_and_open_shapes(make_detector, make_prepared, images, kind, tmp_path):
    detector = make_detector(kind)
    view = fold_float(detector)
    quantized = freeze(make_prepared(detector), {})
    model = expose_heads(export_float(view, 64, dynamic=True), fold_float(detector))
    plain, passed = plain_and_passed(model, quantized, frozenset(), (keep_heads_in_integers,), tmp_path)
    before, after = (_core().read_model(xml).outputs for xml in (plain, passed))
    assert [port.get_partial_shape().rank for port in after] == [port.get_partial_shape().rank for port in before]
    assert [f"head{index}" in port.get_names() for index, port in enumerate(after)] == [True] * len(before)
    for shape in (np.asarray(images), np.asarray(images)[:1, :, :32, :64]):
        ours, theirs = (outputs(xml, shape) for xml in (passed, plain))
        assert [value.shape for value in ours] == [value.shape for value in theirs]
        for left, right in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5 * right.std())


def test_kernels_have_times(engines, images):
    kernels = profile_kernels(compiled(engines["int4"], PERF_COUNT="YES"), images.numpy(), runs=2)
    table = kernel_table(kernels)
    assert table[0][3] > 0 and sum(count for _, _, count, _ in table) == len(kernels)
    assert sum(time for *_, time in table) == pytest.approx(sum(kernel.time_ms for kernel in kernels))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "hardswish"])
def test_a_swapped_activation_is_part_of_the_convolution(pico, make_prepared, make_scheme, activation, tmp_path):
    """No kernel computes it by itself, nor the rounding before or behind it."""
    detector = with_activation(pico, activation)
    prepared = make_prepared(detector, make_scheme(8))
    quantized = freeze(prepared, {})
    raw = expose_heads(export_float(fold_float(detector), 64, dynamic=False), fold_float(detector))
    qdq = insert_qdq(raw, quantized, leave_out=prepared.placement.inner, clip="values")
    kernels = executed_kernels(compiled(write(qdq, tmp_path / "m", ir_passes(quantized, "int8"))))
    convolutions = [kernel for kernel in kernels if kernel.kind == "Convolution"]
    assert len(convolutions) == len(quantized.layers) and all(kernel.is_integer for kernel in convolutions)
    # What is left computes no activation: the image is rounded, the maps are made float, residuals are added.
    others = {kernel.kind for kernel in kernels} - {"Convolution"}
    assert others <= {"Concatenation", "Eltwise", "Interpolate", "Pooling", "Reorder", "Split", "Subgraph"}
    alone = [kernel.name for kernel in kernels if kernel.kind == "Subgraph"]
    assert all(name.startswith(("DequantizeLinear:images", "head")) for name in alone)


# --- the ONNX for ONNX Runtime, read as it is ---


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_one_onnx_runs_in_integers_in_both_runtimes(float_model, quantized, images, storage, tmp_path):
    """Packed weights too; a file for OpenVINO alone is faster, because nothing is rounded inside SiLU."""
    path = tmp_path / "shared.onnx"
    model = insert_qdq(float_model, quantized, storage=storage)
    ir.save(model, path)
    convolutions = [kernel for kernel in executed_kernels(compiled(path)) if kernel.kind == "Convolution"]
    assert len(convolutions) == len(quantized.layers) and all(kernel.is_integer for kernel in convolutions)
    reference, shown = IntegerReference(ir.to_proto(model)), images[:1].numpy()
    assert_explained(reference, openvino_run(path, reference)(shown), shown)


# --- size ---


def test_sizes_of_the_official_network(official, make_prepared, make_scheme, photographs, tmp_path):
    detector, eight, model = official
    four = freeze(make_prepared(detector, make_scheme(4), photographs), {})
    raw = partial(expose_heads, view=fold_float(detector))  # without the decode's constants, which depend on the size
    files = {
        "fp32": write(raw(model), tmp_path / "fp32"),
        "w8": write(insert_qdq(raw(model), eight, clip="values"), tmp_path / "w8", ir_passes(eight, "int8")),
        "w4": write(insert_qdq(raw(model), four, clip="values"), tmp_path / "w4", ir_passes(four, "int4")),
    }
    assert bin_size(files["w4"]) <= 0.55 * bin_size(files["w8"])
    assert bin_size(files["w4"]) <= 0.19 * bin_size(files["fp32"])


def test_the_build_packs_what_the_recipe_says(tiny_build):
    """The quickstart stores weights of 4 bits, between ends of 8 bits."""
    (xml,) = tiny_build.openvino.glob("*.xml")
    stored = Counter(element_types(xml).values())
    assert stored["i4"] > 40 and 0 < stored["i8"] < 10
    assert OpenVinoRunner(tiny_build.openvino).names
