"""What processors lack: without VNNI, x86 adds two products with uint8 in 16 bits, which saturate."""

import platform

import numpy as np
import pytest
from helpers.engines import session_of
from helpers.integer_reference import convolve
from onnx import TensorProto, helper, numpy_helper

from qyolo_deploy.artifact import converts_bfloat16, saturates_products
from qyolo_deploy.quant.model import QuantizedLayer, QuantizedModel
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import LayerScheme, QuantScheme, QuantSpec
from qyolo_deploy.recipe import Recipe

LAYERS = ["first", "middle", "last"]


def resolved(**others):
    scheme = QuantScheme(QuantSpec(4), QuantSpec(8, signed=False), **others)
    return scheme.resolve(LAYERS, ["first", "last"])


def test_only_weights_of_eight_bits_lose_one():
    assert resolved(reduce_range=True) == {
        "first": LayerScheme(7, 8),
        "middle": LayerScheme(4, 8),
        "last": LayerScheme(7, 8),
    }
    assert resolved()["first"] == LayerScheme(8, 8)
    assert resolved(reduce_range=True, keep_float=["last"])["last"] == LayerScheme(None, None)
    assert resolved(reduce_range=True, overrides={"middle": LayerScheme(8, 4)})["middle"] == LayerScheme(7, 4)


def test_recipes_reduce_the_range_unless_told_otherwise():
    def scheme(**weights):
        sections = {"model": {"weights": "m.pt"}, "data": {"source": "d"}, "quantization": {"weights": weights}}
        return Recipe.model_validate({"name": "r", **sections}).quantization.scheme()

    assert scheme().reduce_range and scheme().label == "w8a8"
    assert not scheme(reduce_range=False).reduce_range


def added_in_16_bits(codes, weights):
    """What `vpmaddubsw` makes of neighbouring products."""
    products = codes.astype(np.int64) * weights
    return np.clip(products[0::2] + products[1::2], -(2**15), 2**15 - 1).sum(), products.sum()


def test_seven_bits_fit_into_the_sums_and_eight_do_not():
    codes = np.array([255, 255], np.uint8)
    for bits, is_exact in ((7, True), (8, False)):
        spec = QuantSpec(bits)
        found = [added_in_16_bits(codes, np.array([end, end])) for end in (spec.qmin, spec.qmax)]
        assert all(saturated == exact for saturated, exact in found) == is_exact


def test_layers_of_full_range_are_told():
    def layer(largest):
        spec = QuantSpec(8, granularity="per_channel", axis=0)
        weight = np.array([[[[largest]]], [[[-64]]]], np.int8)
        return QuantizedLayer(weight, QParams.of(spec, np.ones(2)), np.zeros(2, np.int32), "images")

    activations = {"images": QParams.of(QuantSpec(8, signed=False), 1.0)}
    layers = {"wide": layer(65), "lowest": layer(-128), "safe": layer(64)}
    assert QuantizedModel({}, layers, activations, {}, "w8a8").wide_layers == ("wide", "lowest")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86 processors")
@pytest.mark.parametrize(
    ("flags", "saturates"), [("sse4_1", True), ("avx2", True), ("avx2 avx_vnni", False), ("avx512_vnni", False)]
)
def test_a_processor_without_vnni_saturates(flags, saturates, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags} aes\n")
    assert saturates_products(tmp_path / "cpuinfo") is saturates
    assert saturates_products(tmp_path / "nothing") is False  # nobody knows


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86 processors")
@pytest.mark.parametrize(("flags", "converts"), [("avx2", True), ("avx512_bf16", False), ("amx_bf16", False)])
def test_a_processor_without_bfloat16_converts(flags, converts, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags} aes\n")
    assert converts_bfloat16(tmp_path / "cpuinfo") is converts
    assert converts_bfloat16(tmp_path / "nothing") is False


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_our_sessions_add_weights_of_full_range_exactly_on_any_processor(groups):
    rng = np.random.default_rng(0)
    codes = rng.integers(128, 256, (1, 8, 6, 6)).astype(np.uint8)
    weights = rng.integers(-128, 128, (8, 8 // groups, 3, 3)).astype(np.int8)
    step = np.float32(0.001)
    facts = {"group": groups, "pads": [1, 1, 1, 1]}
    found = session_of(convolution(weights, step, facts)).run(None, {"images": codes.astype(np.float32)})[0]
    exact = convolve(codes, weights, facts) * float(step) + 128
    assert np.abs(found - np.clip(exact, 0, 255)).max() <= 0.5 + 1e-4
    assert len(np.unique(found)) > 100


def convolution(weights, step, facts):
    """A quantized convolution whose output is its codes; all other scales are 1."""
    channels = len(weights)
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "w": weights,
        "ws": np.full(channels, step),
        "wz": np.zeros(channels, np.int8),
        "b": np.zeros(channels, np.int32),
        "middle": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "ws"], ["bd"], axis=0),
        helper.make_node("Conv", ["x", "wd", "bd"], ["y"], **facts),
        helper.make_node("QuantizeLinear", ["y", "one", "middle"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "convolution",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, channels, 6, 6])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
