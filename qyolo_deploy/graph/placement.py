"""Decides which tensors of a traced network are quantized, with which grid, and which share one.

The rules follow what the runtimes fuse: every convolution has quantized inputs, weights and outputs; Sigmoid,
Mul and Add have quantized outputs; Concat, pooling, resizing and splitting repeat the scale of what they read.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from qyolo_deploy.graph.ops import Add, Concat, Mul, Rearrange, only_repeats
from qyolo_deploy.graph.trace import INPUT
from qyolo_deploy.quant.spec import LayerScheme, QuantScheme, QuantSpec

INNER_BITS = 8
_REPEATING_MODULES = (nn.MaxPool2d, nn.Upsample, Concat, Rearrange)


@dataclass(frozen=True)
class Placement:
    """Where a network is quantized.

    Args:
        layers: Convolution name -> its bits, quantized layers only.
        inputs: Convolution name -> name of the tensor that it reads.
        groups: Tensor name -> name of the group of tensors that share its scale; the group is named after its first.
        specs: Group name -> grid.
        repeats: Tensors that only repeat their group's values (Concat, pooling, resizing): quantizing them again
            changes nothing, but a runtime wants to see it.
        inner: Tensors between a convolution and the result of its activation (the input of SiLU or HardSwish, the
            sigmoid of SiLU), which some runtimes fuse away.
        offset: Whether the inputs of convolutions have an offset.
    """

    layers: Mapping[str, LayerScheme]
    inputs: Mapping[str, str]
    groups: Mapping[str, str]
    specs: Mapping[str, QuantSpec]
    repeats: frozenset[str]
    inner: frozenset[str]
    offset: bool = True


class _Network:
    """Typed look-ups on a traced graph."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.nodes = list(traced.graph.nodes)
        self._modules = dict(traced.named_modules())

    def module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def is_conv(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), nn.Conv2d)

    def convs(self) -> list[fx.Node]:
        return [node for node in self.nodes if self.is_conv(node)]

    def norm_of(self, conv: fx.Node) -> fx.Node | None:
        """The batch normalisation that alone reads a convolution."""
        users = list(conv.users)
        if len(users) == 1 and isinstance(self.module(users[0]), nn.BatchNorm2d):
            return users[0]
        return None

    def owner(self, node: fx.Node) -> fx.Node:
        """The convolution behind a batch normalisation, or the node itself: it names the tensor."""
        if isinstance(self.module(node), nn.BatchNorm2d) and self.is_conv(node.args[0]):  # type: ignore[arg-type]
            return node.args[0]  # type: ignore[return-value]
        return node

    def repeats(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.module(node), _REPEATING_MODULES)
        return only_repeats(node)

    def repeated(self, node: fx.Node) -> list[fx.Node]:
        """Tensors whose values a repeating node gives; what else it reads are sizes."""
        return node.all_input_nodes if isinstance(self.module(node), Concat) else node.all_input_nodes[:1]

    def is_named(self, node: fx.Node) -> bool:
        return node.op in ("call_module", "placeholder")


class _Groups:
    """Union-find over nodes; the representative is the first node in order of execution."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._order = {node: index for index, node in enumerate(nodes)}
        self._parent = {node: node for node in self._order}

    def find(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            node = self._parent[node]
        return node

    def join(self, left: fx.Node, right: fx.Node) -> None:
        first, second = sorted((self.find(left), self.find(right)), key=self._order.__getitem__)
        self._parent[second] = first


def layer_names(traced: fx.GraphModule) -> tuple[list[str], list[str]]:
    """Names of all convolutions in order of execution, and of the first and last ones among them."""
    network = _Network(traced)
    convs = network.convs()
    output = network.nodes[-1]
    last = [str(network.owner(node).target) for node in output.all_input_nodes]
    return [str(node.target) for node in convs], [str(convs[0].target), *last]


def place(traced: fx.GraphModule, scheme: QuantScheme, inside_activations: bool = True) -> Placement:
    """Applies the rules to a traced network.

    Args:
        traced: From `trace`.
        scheme: Bits by layer.
        inside_activations: Whether tensors inside activations are quantized, which ONNX Runtime needs to stay in
            integers and which keeps OpenVINO and TensorRT from fusing.

    Returns:
        The placement. One that was made for several runtimes is the fullest; others leave its `inner` out.

    Raises:
        InputError: For a glob of the scheme that matches no layer.
    """
    network = _Network(traced)
    names, ends = layer_names(traced)
    layers = {name: layer for name, layer in scheme.resolve(names, ends).items() if layer.weight_bits is not None}
    groups = _join_repeats(network)
    quantized = _quantized_nodes(network, groups, layers)
    roots = {groups.find(node) for node in quantized}
    layers = {name: layer for name, layer in layers.items() if _readable(network, groups, roots, name)}
    inner = frozenset(_inner_names(network))
    unseen = frozenset(_before_relu(network)) | (frozenset() if inside_activations else inner)
    tensors = {
        str(network.owner(node).target): str(network.owner(groups.find(node)).target)
        for node in network.nodes
        if network.is_named(node) and groups.find(node) in roots and not _is_hidden_conv(network, node)
    }
    tensors = {name: group for name, group in tensors.items() if name not in unseen}
    bits = _group_bits(network, groups, layers)
    inputs = {name: _input_of(network, groups, name) for name in layers}
    read = {tensors[source] for source in inputs.values()}
    aside = inner | {group for group in map(tensors.get, _image_and_maps(network)) if group not in read - {INPUT}}
    return Placement(
        layers=layers,
        inputs=inputs,
        groups=tensors,
        # In order of execution, not of a set: the order of parameters must be the same in every process, because
        # the optimizer's state in a checkpoint goes by it.
        specs={
            group: _activation_spec(scheme, bits.get(group, INNER_BITS), group in aside)
            for group in dict.fromkeys(tensors.values())
        },
        repeats=frozenset(
            str(node.target) for node in network.nodes if node.op == "call_module" and network.repeats(node)
        )
        & set(tensors),
        inner=inner & set(tensors),
        offset=scheme.offset,
    )


def _join_repeats(network: _Network) -> _Groups:
    groups = _Groups(network.nodes)
    for node in network.nodes:
        if network.repeats(node):
            for source in network.repeated(node):
                groups.join(node, source)
    return groups


def _is_hidden_conv(network: _Network, node: fx.Node) -> bool:
    """A convolution whose value is only seen after its batch normalisation."""
    return network.is_conv(node) and network.norm_of(node) is not None


def _quantized_nodes(network: _Network, groups: _Groups, layers: Mapping[str, LayerScheme]) -> list[fx.Node]:
    """Nodes whose outputs are rounded: outputs and inputs of quantized layers, and what is computed from those."""
    found: list[fx.Node] = []
    for node in network.convs():
        if str(node.target) in layers:
            found += [network.norm_of(node) or node, *node.all_input_nodes]
    roots = {groups.find(node) for node in found}
    for node in network.nodes:
        is_elementwise = isinstance(network.module(node), nn.Sigmoid | nn.ReLU | nn.Hardswish | Mul | Add)
        if is_elementwise and any(groups.find(source) in roots for source in node.all_input_nodes):
            found.append(node)
            roots.add(groups.find(node))
    return found


def _readable(network: _Network, groups: _Groups, roots: set[fx.Node], name: str) -> bool:
    """Whether a layer's input comes from a tensor with a name; what comes from a bare function stays float."""
    conv = next(node for node in network.convs() if node.target == name)
    return network.is_named(groups.find(conv.args[0])) and groups.find(conv.args[0]) in roots  # type: ignore[arg-type]


def _input_of(network: _Network, groups: _Groups, name: str) -> str:
    conv = next(node for node in network.convs() if node.target == name)
    source = conv.args[0]
    assert isinstance(source, fx.Node)
    named = source if network.is_named(source) else groups.find(source)
    return str(network.owner(named).target)


def _group_bits(network: _Network, groups: _Groups, layers: Mapping[str, LayerScheme]) -> dict[str, int]:
    """Bits of each group that a convolution reads: the highest that one of its readers asks for.

    What attention reads keeps 8 bits, whatever a convolution beside it asks for: its products stay float.
    """
    attended = {groups.find(source) for node in network.nodes if _is_product(node) for source in node.all_input_nodes}
    bits = {str(network.owner(root).target): INNER_BITS for root in attended}
    for conv in network.convs():
        layer = layers.get(str(conv.target))
        if layer is None or layer.activation_bits is None:
            continue
        group = str(network.owner(groups.find(conv.args[0])).target)  # type: ignore[arg-type]
        bits[group] = max(bits.get(group, 0), layer.activation_bits)
    return bits


def _is_product(node: fx.Node) -> bool:
    """A product by a plain function; that of SiLU is a module."""
    return node.op == "call_function" and node.target in (operator.mul, operator.matmul, torch.matmul)


def _image_and_maps(network: _Network) -> list[str]:
    """Names of the image and of the raw head maps, which no integer kernel of TensorRT takes or gives."""
    return [INPUT, *(str(network.owner(node).target) for node in network.nodes[-1].all_input_nodes)]


def _activation_spec(scheme: QuantScheme, bits: int, is_aside: bool) -> QuantSpec:
    """Signed where a symmetric grid is asked for and needed.

    TensorRT computes with int8 around 0 alone. Fewer bits fit with any zero point; images and raw head maps stay
    outside its integer kernels, and what is inside activations within one, so that these keep all of their levels.
    """
    return QuantSpec(bits=bits, signed=scheme.activations.signed and bits == INNER_BITS and not is_aside)


def _inner_names(network: _Network) -> Iterable[str]:
    for node in network.nodes:
        if isinstance(network.module(node), nn.Sigmoid) and _is_silu_gate(network, node):
            yield str(node.target)
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if len(source.users) == 2:  # the gate and the product: nobody else sees the value before SiLU
                yield str(network.owner(source).target)

        if isinstance(network.module(node), nn.Hardswish) and (name := _only_reader_of(network, node)):
            yield name


def _before_relu(network: _Network) -> Iterable[str]:
    """Convolutions whose result only a ReLU reads: both are one kernel everywhere, which clips at 0 by itself."""
    for node in network.nodes:
        if isinstance(network.module(node), nn.ReLU) and (name := _only_reader_of(network, node)):
            yield name


def _only_reader_of(network: _Network, node: fx.Node) -> str | None:
    """Name of the convolution whose result nobody but this node reads."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    is_conv = network.is_conv(network.owner(source))
    return str(network.owner(source).target) if is_conv and len(source.users) == 1 else None


def _is_silu_gate(network: _Network, node: fx.Node) -> bool:
    return any(isinstance(network.module(user), Mul) and node.args[0] in user.args for user in node.users)
