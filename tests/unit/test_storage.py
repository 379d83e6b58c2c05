from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.engines import optimised, session_of
from onnx import TensorProto

from qyolo_deploy.errors import InputError
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.export.storage import INT2, container_for, raise_opset
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.quant.spec import LayerScheme, QuantScheme, QuantSpec

PACKED = {TensorProto.INT2: 2, TensorProto.INT4: 4, TensorProto.INT8: 8}
# One block keeps 3 bits and one 4, as a recipe's overrides may ask for; the ends have 8.
WIDER = {"model.2.*": LayerScheme(3, 8), "model.4.*": LayerScheme(4, 8)}


def of_two_bits(**others):
    return QuantScheme(QuantSpec(2), QuantSpec(8, signed=False), **others)


@pytest.fixture(scope="module")
def mixed(pico, make_prepared):
    """Weights of 2, 3, 4 and 8 bits in one network."""
    return freeze(make_prepared(pico, of_two_bits(overrides=WIDER)), {})


def run(model, images):
    return session_of(ir.to_proto(model).SerializeToString()).run(None, {"images": images.numpy()})[0]


@pytest.mark.parametrize(
    ("storage", "widths"), [("int8", [8, 8, 8, 8]), ("int4", [4, 4, 4, 8]), ("int2", [2, 4, 4, 8])]
)
def test_each_grid_gets_the_narrowest_container_of_the_file(storage, widths):
    found = [container_for(QuantSpec(bits), storage) for bits in (2, 3, 4, 5)]
    assert [8 if container is None else container.bits for container in found] == widths


def test_a_grid_that_begins_at_zero_needs_a_bit_more():
    assert container_for(QuantSpec(2, signed=False), "int2").bits == 4
    assert container_for(QuantSpec(4, signed=False), "int4") is None


def test_two_bits_lie_in_two_bits_and_wider_grids_beside_them(float_model, mixed):
    proto = ir.to_proto(insert_qdq(float_model, mixed, storage="int2"))
    onnx.checker.check_model(proto)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 25)]
    assert proto.ir_version == 13
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    seen = Counter()
    for name, layer in mixed.layers.items():
        tensor, bits = stored[f"{name}.weight_quantized"], layer.qparams.spec.bits
        assert PACKED[tensor.data_type] == {2: 2, 3: 4, 4: 4, 8: 8}[bits]
        assert len(tensor.raw_data) == -(-layer.weight.size * PACKED[tensor.data_type] // 8)
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), layer.weight)
        seen[bits] += 1
    assert set(seen) == {2, 3, 4, 8}


def test_it_changes_the_file_and_nothing_else(float_model, mixed, images, tmp_path):
    files = {storage: insert_qdq(float_model, mixed, storage=storage) for storage in ("int8", "int2")}
    kinds = [Counter(node.op_type for node in optimised(file, tmp_path).node) for file in files.values()]
    assert kinds[0] == kinds[1] and kinds[0]["QLinearConv"] == len(mixed.layers)
    np.testing.assert_array_equal(run(files["int2"], images), run(files["int8"], images))


@pytest.mark.parametrize("storage", ["int8", "int4", "int2"])
def test_the_opset_is_as_low_as_the_content_allows(float_model, quantized, storage):
    """Weights of 4 and 8 bits are never stored in 2."""
    model = insert_qdq(float_model, quantized, storage=storage)
    assert (model.opset_imports[""], model.ir_version) == ((18, 8) if storage == "int8" else (21, 10))
    assert (float_model.opset_imports[""], float_model.ir_version) == (18, 8)


def test_the_file_of_the_official_network_is_smaller_by_the_bits(official, make_prepared, photographs):
    """2 bits against 4: half of the packed weights; what is not packed (8-bit ends, biases, the graph) stays."""
    detector, _, model = official
    narrow = freeze(make_prepared(detector, of_two_bits(), photographs), {})
    size = {
        storage: len(ir.to_proto(insert_qdq(model, narrow, storage=storage)).SerializeToString())
        for storage in ("int8", "int4", "int2")
    }
    weights = sum(layer.weight.size for layer in narrow.layers.values() if layer.qparams.spec.bits == 2)
    assert size["int4"] - size["int2"] == pytest.approx(weights / 4, rel=0.01)
    assert size["int2"] <= 0.45 * size["int8"]


def test_an_operator_that_means_something_else_later_is_refused():
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[1,4,8] x, float[2] s, float[2] b) => (float[1,4,8] y) '
    model = ir.from_proto(onnx.parser.parse_model(text + "{ y = GroupNormalization <num_groups = 2> (x, s, b) }"))
    with pytest.raises(InputError, match="'GroupNormalization' means something else in opset 25"):
        raise_opset(model, INT2)
