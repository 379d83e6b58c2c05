"""Puts quantizers into a traced float network and gives access to them by name."""

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from qyolo_deploy.graph.fake_quantize import Quantizer
from qyolo_deploy.graph.features import expose_blocks
from qyolo_deploy.graph.fused_silu import fuse_silu
from qyolo_deploy.graph.layers import QuantConv
from qyolo_deploy.graph.placement import Placement, place
from qyolo_deploy.graph.trace import trace
from qyolo_deploy.models.base import Detector, ModelSpec
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

_QUANTIZERS = "quantizers"


class PreparedModel(nn.Module):
    """A fake-quantized detector that learns: images in, raw head maps out.

    Args:
        graph: The network with `QuantConv` and `Quantizer` modules.
        placement: Where it is quantized.
        spec: The architecture.
        scheme: Bits by layer.
        maps: Number of raw head maps among the graph's outputs, which come first.
    """

    def __init__(
        self, graph: fx.GraphModule, placement: Placement, spec: ModelSpec, scheme: QuantScheme, maps: int
    ) -> None:
        super().__init__()
        self._maps = maps
        self.graph = graph
        self.placement = placement
        self.spec = spec
        self.scheme = scheme
        self.tracker: nn.Module | None = None  # of oscillations, while it trains
        quantizers = self.quantizers()
        for name, conv in self.convs().items():
            if name in placement.inputs:
                conv.source = (quantizers[placement.groups[placement.inputs[name]]],)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Float32 `[N, 3, H, W]` in 0..1 to the raw head maps."""
        return self.features(images)[0]

    def features(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Raw head maps, and the outputs of the blocks (see `expose_blocks`)."""
        outputs: tuple[Tensor, ...] = self.graph(images)
        return outputs[: self._maps], outputs[self._maps :]

    def convs(self) -> dict[str, QuantConv]:
        """Convolution name -> module, in order of execution, float ones too."""
        calls = [str(node.target) for node in self.graph.graph.nodes if node.op == "call_module"]
        modules = {name: self.graph.get_submodule(name) for name in calls}
        return {name: module for name, module in modules.items() if isinstance(module, QuantConv)}

    def quantizers(self) -> dict[str, Quantizer]:
        """Group name -> activation quantizer, shared by the tensors of the group."""
        found = {}
        for group in self.placement.specs:
            module = self.graph.get_submodule(f"{_QUANTIZERS}.{group}")
            assert isinstance(module, Quantizer)
            found[group] = module
        return found

    def output_quantizers(self) -> list[Quantizer | None]:
        """Quantizer of each raw head map; None where the map stays float."""
        maps = list(self.graph.graph.output_node().args[0])[: self._maps]  # type: ignore[arg-type]
        modules = [self.graph.get_submodule(str(node.target)) for node in maps]
        return [module if isinstance(module, Quantizer) else None for module in modules]

    def set_activations(self, enabled: bool) -> None:
        """Switches activation quantization on or off, for calibration."""
        for quantizer in self.quantizers().values():
            quantizer.enabled = enabled

    def set_weights(self, enabled: bool) -> None:
        """Switches weight quantization on or off, for calibration."""
        for conv in self.convs().values():
            if conv.quantizer is not None:
                conv.quantizer.enabled = enabled

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings scales, offsets and gammas back into their ranges, after an optimizer step."""
        for module in self.modules():
            if isinstance(module, QuantConv | Quantizer):
                module.clamp_()


def prepare(detector: Detector, scheme: QuantScheme, inside_activations: bool = True) -> PreparedModel:
    """Makes a fake-quantized copy of a float detector; scales still have to be calibrated.

    Args:
        detector: The float network with its weights.
        scheme: Bits by layer.
        inside_activations: See `place`.

    Raises:
        InputError: If the network cannot be traced or a glob matches no layer.
    """
    traced = trace(detector.core.eval())
    placement = place(traced, scheme, inside_activations)
    maps = expose_blocks(traced)
    _replace_convs(traced, placement, scheme.weights)
    _insert_quantizers(traced, placement)
    traced.delete_all_unused_submodules()
    fuse_silu(traced)
    traced.graph.lint()
    traced.recompile()
    return PreparedModel(traced, placement, detector.spec, scheme, maps)


def _replace_convs(traced: fx.GraphModule, placement: Placement, weights: QuantSpec) -> None:
    """Convolution and batch normalisation become one `QuantConv` under the convolution's name."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.Conv2d):
            continue
        users = list(node.users)
        norm = modules.get(str(users[0].target)) if len(users) == 1 and users[0].op == "call_module" else None
        norm = norm if isinstance(norm, nn.BatchNorm2d) else None
        layer = placement.layers.get(str(node.target))
        bits = layer.weight_bits if layer is not None else None
        spec = replace(weights, bits=bits) if bits is not None else None
        traced.add_submodule(str(node.target), QuantConv(module, norm, spec))
        if norm is not None:
            users[0].replace_all_uses_with(node)
            traced.graph.erase_node(users[0])


def _insert_quantizers(traced: fx.GraphModule, placement: Placement) -> None:
    read = {placement.groups[source] for source in placement.inputs.values()}
    for group, spec in placement.specs.items():
        # What no convolution reads (head maps, inputs of SiLU) would lose its whole meaning with its negative values.
        offset = placement.offset or group not in read
        traced.add_submodule(f"{_QUANTIZERS}.{group}", Quantizer(spec, offset=offset))
    for node in list(traced.graph.nodes):
        name = str(node.target)
        if name not in placement.groups or name in placement.repeats:
            continue
        with traced.graph.inserting_after(node):
            call = traced.graph.call_module(f"{_QUANTIZERS}.{placement.groups[name]}", (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
