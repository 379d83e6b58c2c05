import pytest
import torch
from torch import nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.graph.fake_quantize import Quantizer, zero_point_of
from qyolo_deploy.graph.layers import QuantConv
from qyolo_deploy.graph.ops import Add, Concat, Mul, Rearrange
from qyolo_deploy.graph.placement import INNER_BITS, layer_names, place
from qyolo_deploy.graph.prepare import prepare
from qyolo_deploy.graph.trace import trace
from qyolo_deploy.models.registry import with_activation
from qyolo_deploy.quant.spec import LayerScheme, QuantScheme, QuantSpec

KINDS = ["pico", "yolov5", "yolo11n"]
W4A6 = QuantScheme(QuantSpec(4), QuantSpec(6, signed=False))


@pytest.fixture(scope="module")
def detectors(make_detector):
    return {kind: make_detector(kind) for kind in KINDS}


@pytest.fixture
def placed(small_network):
    """Function from a scheme to the traced small network and its placement."""

    def make(scheme=W4A6):
        traced = trace(small_network().core)
        return traced, place(traced, scheme)

    return make


def of_kind(traced, *kinds):
    return [
        node
        for node in traced.graph.nodes
        if node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), kinds)
    ]


def test_every_tensor_of_a_small_network(placed):
    _, placement = placed()
    assert placement.groups == {
        "images": "images",
        "stem.0": "stem.0",
        "stem.2.sigmoid": "stem.2.sigmoid",
        "stem.2.mul": "stem.2.mul",  # split, pooled, resized and joined with the sum: one scale for all of them
        "pool": "stem.2.mul",
        "up": "stem.2.mul",
        "add": "stem.2.mul",
        "concat": "stem.2.mul",
        "a.0": "a.0",
        "a.2.sigmoid": "a.2.sigmoid",
        "a.2.mul": "a.2.mul",
        "c.0": "c.0",
        "c.2.sigmoid": "c.2.sigmoid",
        "c.2.mul": "c.2.mul",
        "b.0": "b.0",
        "b.2.sigmoid": "b.2.sigmoid",
        "b.2.mul": "b.2.mul",
        "head_1": "head_1",
        "head_2": "head_2",
    }
    assert placement.repeats == {"pool", "up", "concat"}
    assert placement.inner == {f"{name}.{part}" for name in ("stem", "a", "b", "c") for part in ("0", "2.sigmoid")}
    assert placement.inputs == {
        "stem.0": "images",
        "a.0": "stem.2.mul",
        "c.0": "stem.2.mul",
        "b.0": "concat",
        "head_1": "b.2.mul",
        "head_2": "b.2.mul",
    }


def test_bits_go_by_the_readers_of_a_group(placed):
    traced, placement = placed()
    assert layer_names(traced)[1] == ["stem.0", "head_1", "head_2"]
    bits = {group: spec.bits for group, spec in placement.specs.items()}
    assert bits["images"] == 8  # read by the first layer
    assert bits["b.2.mul"] == 8  # read by the last ones
    assert bits["stem.2.mul"] == 6
    assert bits["a.2.mul"] == INNER_BITS  # only the sum reads it
    assert all(bits[name] == INNER_BITS for name in placement.inner)
    assert all(not spec.signed for spec in placement.specs.values())
    assert placement.layers["a.0"] == LayerScheme(4, 6)
    assert placement.layers["head_2"] == LayerScheme(8, 8)


def test_the_reader_that_asks_for_most_decides(placed):
    scheme = QuantScheme(
        QuantSpec(4), QuantSpec(4, signed=False), overrides={"a.*": LayerScheme(4, 7), "c.*": LayerScheme(3, 5)}
    )
    _, placement = placed(scheme)
    assert placement.specs["stem.2.mul"].bits == 7
    assert placement.layers["c.0"].weight_bits == 3


def test_a_layer_in_float_is_no_layer_and_asks_for_nothing(placed):
    scheme = QuantScheme(QuantSpec(4), QuantSpec(6, signed=False), keep_float=["a.*", "head_1"])
    _, placement = placed(scheme)
    assert "a.0" not in placement.layers and "a.0" not in placement.inputs and "a.0" not in placement.groups
    assert "head_1" not in placement.layers and "head_1" not in placement.groups
    assert placement.inputs["head_2"] == "b.2.mul"  # which head_1 reads too


def test_ends_of_other_bits(placed):
    scheme = QuantScheme(QuantSpec(4), QuantSpec(6, signed=False), first_last_bits=5)
    _, placement = placed(scheme)
    assert placement.specs["images"].bits == placement.specs["b.2.mul"].bits == 5
    assert placement.layers["stem.0"] == LayerScheme(5, 5)


def test_symmetric_activations_are_those_of_8_bits_between_integer_kernels(placed):
    _, placement = placed(QuantScheme(QuantSpec(8), QuantSpec(8)))
    signed = {group for group, spec in placement.specs.items() if spec.signed}
    assert signed == {"stem.2.mul", "a.2.mul", "c.2.mul", "b.2.mul"}
    _, placement = placed(QuantScheme(QuantSpec(4), QuantSpec(6)))
    assert {group for group, spec in placement.specs.items() if spec.signed} == {"a.2.mul", "b.2.mul", "c.2.mul"}


def test_a_glob_that_matches_nothing_is_refused(placed):
    with pytest.raises(InputError, match="head_9"):
        placed(QuantScheme(QuantSpec(4), QuantSpec(8, signed=False), keep_float=["head_9"]))


def test_order_is_that_of_execution(placed):
    """Not that of a set: parameters and the optimizer's state in checkpoints go by it, from process to process."""
    traced, placement = placed()
    order = [str(node.target) for node in traced.graph.nodes]
    assert list(placement.specs) == sorted(placement.specs, key=order.index)
    assert list(placement.layers) == sorted(placement.layers, key=order.index)


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_passes_values_on_shares_their_scale(detectors, kind):
    traced = trace(detectors[kind].core)
    placement = place(traced, W4A6)
    passing = of_kind(traced, Concat, nn.MaxPool2d, nn.Upsample, Rearrange)
    assert len(passing) >= 7
    for node in passing:
        name = str(node.target)
        assert name in placement.repeats
        rearranges = isinstance(traced.get_submodule(name), Rearrange)
        for source in node.all_input_nodes[:1] if rearranges else node.all_input_nodes:
            while source.op != "call_module":  # the parts of a split
                source = source.args[0]
            if isinstance(traced.get_submodule(str(source.target)), nn.BatchNorm2d):
                source = source.args[0]
            assert placement.groups[str(source.target)] == placement.groups[name]
    assert {str(node.target) for node in passing} == placement.repeats


@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_both_of_their_inputs_are_quantized(detectors, kind):
    traced = trace(detectors[kind].core)
    placement = place(traced, W4A6)
    inside_attention = {str(node.target) for node in of_kind(traced, Add) if ".attn." in str(node.target)}
    sums = [node for node in of_kind(traced, Add) if str(node.target) not in inside_attention]
    assert sums
    for node in sums:
        assert str(node.target) in placement.groups and str(node.target) not in placement.repeats
        for source in node.args:
            while source.op != "call_module":
                source = source.args[0]
            if isinstance(traced.get_submodule(str(source.target)), nn.BatchNorm2d):
                source = source.args[0]
            assert str(source.target) in placement.groups


@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_silu_are_its_input_and_its_sigmoid(detectors, kind):
    traced = trace(detectors[kind].core)
    placement = place(traced, W4A6)
    expected = set()
    for product in of_kind(traced, Mul):
        norm, gate = product.args
        expected |= {str(norm.args[0].target), str(gate.target)}
    assert placement.inner == expected
    assert all(placement.specs[placement.groups[name]].bits == INNER_BITS for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_inside_activations_can_be_left_out(detectors, kind):
    """And nothing else changes: not what a convolution reads, nor any other grid."""
    traced = trace(detectors[kind].core)
    full, lean = place(traced, W4A6), place(traced, W4A6, inside_activations=False)
    assert len(full.inner) > 40 and not lean.inner
    assert lean.groups == {name: group for name, group in full.groups.items() if name not in full.inner}
    assert lean.specs == {group: spec for group, spec in full.specs.items() if group not in full.inner}
    assert (lean.layers, lean.inputs, lean.repeats) == (full.layers, full.inputs, full.repeats)


def test_left_out_tensors_are_not_rounded(detectors, make_scheme, images):
    model = prepare(detectors["pico"], make_scheme(), inside_activations=False)
    assert set(model.quantizers()) == set(model.placement.specs)
    modules = dict(model.graph.named_modules())
    for node in of_kind(model.graph, nn.Sigmoid):
        before, product = node.args[0], next(iter(node.users))
        assert isinstance(modules[before.target], QuantConv) and product.args == (before, node)
        assert isinstance(modules[next(iter(product.users)).target], Quantizer)
    assert all(torch.isfinite(raw).all() for raw in model(images))


@pytest.mark.parametrize("inside", [True, False])
def test_a_convolution_and_its_relu_are_one(detectors, inside):
    """Every runtime clips at 0 within the kernel: between the two nothing is rounded."""
    traced = trace(with_activation(detectors["pico"], "relu").core)
    placement = place(traced, W4A6, inside)
    relus = of_kind(traced, nn.ReLU)
    assert len(relus) == 53 and not placement.inner
    for node in relus:
        assert str(node.target) in placement.groups
        assert str(node.args[0].args[0].target) not in placement.groups
    heads = {str(node.target) for node in traced.graph.output_node().args[0]}
    assert {name for name in placement.layers if name in placement.groups} == heads
    assert set(placement.layers) == set(layer_names(traced)[0])


@pytest.mark.parametrize("inside", [True, False])
def test_a_hardswish_reads_an_inner_tensor(detectors, inside):
    traced = trace(with_activation(detectors["pico"], "hardswish").core)
    placement = place(traced, W4A6, inside)
    nodes = of_kind(traced, nn.Hardswish)
    before = {str(node.args[0].args[0].target) for node in nodes}
    assert len(before) == 53
    assert {str(node.target) for node in nodes} <= set(placement.groups)
    assert placement.inner == before & set(placement.groups) == (before if inside else set())
    assert all(placement.specs[name].bits == INNER_BITS for name in placement.inner)


def test_a_value_before_relu_that_others_read_is_rounded():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.ReLU()

        def forward(self, x):
            before = self.a(x)
            return (self.b(self.act(before) + before),)

    placement = place(trace(Network().eval()), W4A6)
    assert set(placement.groups) == {"images", "a", "act", "add", "b"}


def test_grids_without_an_offset(placed):
    _, placement = placed(QuantScheme(QuantSpec(4), QuantSpec(6, signed=False), offset=False))
    assert not placement.offset and placed()[1].offset


@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_the_first_convolution_and_those_of_the_head(detectors, kind):
    traced = trace(detectors[kind].core)
    names, ends = layer_names(traced)
    assert ends[0] == names[0] == "model.0.conv"
    assert ends[1:] == [str(node.target) for node in traced.graph.output_node().args[0]]
    placement = place(traced, W4A6)
    for name in ends:
        assert placement.layers[name] == LayerScheme(8, 8)
        assert placement.specs[placement.groups[placement.inputs[name]]].bits == 8


def test_no_convolution_stays_in_float(detectors):
    for kind in KINDS:
        traced = trace(detectors[kind].core)
        assert set(layer_names(traced)[0]) == set(place(traced, W4A6).layers)


def test_what_attention_reads_keeps_8_bits(detectors):
    """Queries, keys and values are the halves of one tensor; a convolution reads the values as well."""
    placement = place(trace(detectors["yolo11n"].core), W4A6)
    group = placement.groups["model.10.m.0.attn.qkv.conv"]
    assert placement.inputs["model.10.m.0.attn.pe.conv"] == "model.10.m.0.attn.reshape"
    assert placement.groups["model.10.m.0.attn.reshape"] == group
    assert placement.specs[group].bits == INNER_BITS > W4A6.activations.bits
    assert placement.specs[placement.groups[placement.inputs["model.10.m.0.attn.proj.conv"]]].bits == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [(), ("model.1.*",), ("model.2*",), ("*.cv1.conv", "model.0.conv")])
def test_every_quantized_convolution_reads_values_of_its_quantizer_s_grid(
    detectors, kind, kept, make_prepared, make_scheme, images
):
    model = make_prepared(detectors[kind], make_scheme(bits=4, keep_float=kept))
    seen = {}

    def look(name):
        return lambda _, inputs: seen.update({name: inputs[0]})

    quantized = {name: conv for name, conv in model.convs().items() if conv.quantizer is not None}
    assert set(quantized) == set(model.placement.layers)
    for name, conv in quantized.items():
        conv.register_forward_pre_hook(look(name))
    with torch.no_grad():
        model(images)
    assert set(seen) == set(quantized) and len(seen) > 10
    for name, x in seen.items():
        quantizer = model.quantizers()[model.placement.groups[model.placement.inputs[name]]]
        scale, spec = quantizer.scale.detach(), quantizer.spec
        zero_point = zero_point_of(scale, quantizer.offset.detach(), spec.qmin, spec.qmax)
        codes = torch.round(x / scale) + zero_point
        assert torch.equal((codes - zero_point) * scale, x), name
        assert codes.min() >= spec.qmin and codes.max() <= spec.qmax, name
        assert len(codes.unique()) > 3, name
