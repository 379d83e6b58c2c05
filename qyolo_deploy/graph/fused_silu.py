"""SiLU with its quantizers as one operation, which keeps two tensors for the backward pass instead of six."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qyolo_deploy.graph.fake_quantize import Quantizer, elementwise_backward, kernel, round_values, zero_point_of
from qyolo_deploy.graph.ops import Mul

Grid = tuple[Tensor, Tensor, Tensor]
"""Scale, lowest and highest level in steps; float32 `[]` each."""


def _values(
    x: Tensor,
    s0: Tensor, low0: Tensor, high0: Tensor,
    s1: Tensor, low1: Tensor, high1: Tensor,
    s2: Tensor, low2: Tensor, high2: Tensor,
) -> Tensor:  # fmt: skip
    """`q2(q0(x) * q1(sigmoid(q0(x))))`."""
    before = round_values(x, s0, low0, high0)
    gate = round_values(torch.sigmoid(before), s1, low1, high1)
    return round_values(before * gate, s2, low2, high2)


def _gradients(
    grad: Tensor, x: Tensor,
    s0: Tensor, low0: Tensor, high0: Tensor, reach0: Tensor,
    s1: Tensor, low1: Tensor, high1: Tensor, reach1: Tensor,
    s2: Tensor, low2: Tensor, high2: Tensor, reach2: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradient to x, then those to scale and offset of each quantizer, by the chain rule on what is computed again."""
    before = round_values(x, s0, low0, high0)
    smooth = torch.sigmoid(before)
    gate = round_values(smooth, s1, low1, high1)
    to_product, to_s2, to_o2 = elementwise_backward(grad, before * gate, s2, low2, high2, reach2)
    to_smooth, to_s1, to_o1 = elementwise_backward(to_product * before, smooth, s1, low1, high1, reach1)
    to_before = to_product * gate + to_smooth * smooth * (1 - smooth)
    to_x, to_s0, to_o0 = elementwise_backward(to_before, x, s0, low0, high0, reach0)
    return to_x, to_s0.sum(), to_o0.sum(), to_s1.sum(), to_o1.sum(), to_s2.sum(), to_o2.sum()


class _FusedSilu(torch.autograd.Function):
    """Autograd glue; the backward kernel computes the forward values again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizers: Sequence[Quantizer], *_: Tensor) -> Tensor:
        grids = [_grid(quantizer) for quantizer in quantizers]
        ctx.save_for_backward(x, *(tensor for grid in grids for tensor in grid))
        ctx.rules = [(quantizer.rules, quantizer.spec) for quantizer in quantizers]
        output: Tensor = kernel(_values)(x.detach().flatten(), *(tensor for grid in grids for tensor in grid))
        return output.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *flat = ctx.saved_tensors
        arguments = []
        for index, (rules, _) in enumerate(ctx.rules):
            arguments += [*flat[3 * index : 3 * index + 3], rules.reach(x.device)]
        to_x, *sums = kernel(_gradients)(grad.contiguous().flatten(), x.detach().flatten(), *arguments)
        features = x[0].numel()
        found: list[Tensor] = []
        for index, (rules, spec) in enumerate(ctx.rules):
            to_scale, to_offset = sums[2 * index : 2 * index + 2]
            factor = rules.scale_factor(features, spec)
            zero_point = spec.qmin - flat[3 * index + 1]
            found += [(to_scale + zero_point * to_offset) * factor, to_offset * factor]
        return to_x.view(x.shape), None, *found


def _grid(quantizer: Quantizer) -> Grid:
    spec, scale = quantizer.spec, quantizer.scale.detach()
    zero_point = zero_point_of(scale, quantizer.offset.detach(), spec.qmin, spec.qmax)
    return scale, spec.qmin - zero_point, spec.qmax - zero_point


class FusedSilu(nn.Module):
    """`q2(q0(x) * q1(sigmoid(q0(x))))` of three quantizers that belong to other modules.

    Args:
        quantizers: Of SiLU's input, its sigmoid and its result.
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        super().__init__()
        self._quantizers = tuple(quantizers)  # a tuple, so that their parameters are not registered twice

    def forward(self, x: Tensor) -> Tensor:
        """Float32 of any shape to float32 of the same shape; step by step while a quantizer is switched off."""
        if not all(quantizer.enabled for quantizer in self._quantizers):
            q0, q1, q2 = self._quantizers
            before: Tensor = q0(x)
            result: Tensor = q2(before * q1(torch.sigmoid(before)))
            return result
        parameters = [tensor for quantizer in self._quantizers for tensor in (quantizer.scale, quantizer.offset)]
        output: Tensor = _FusedSilu.apply(x.float(), self._quantizers, *parameters)  # type: ignore[no-untyped-call]
        return output


def fuse_silu(graph: fx.GraphModule) -> None:
    """Makes one call of each SiLU that has three quantizers.

    Args:
        graph: With quantizers; changed in place.
    """
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        product = node.args[0] if isinstance(modules.get(str(node.target)), Quantizer) else None
        if isinstance(product, fx.Node) and isinstance(modules.get(str(product.target)), Mul):
            _fuse(graph, node, product, modules)


def _fuse(graph: fx.GraphModule, last: fx.Node, product: fx.Node, modules: dict[str, nn.Module]) -> None:
    """Replaces `last = q2(product)`, `product = before * q1(sigmoid(before))`, `before = q0(x)`."""
    before, gate = product.args
    assert isinstance(before, fx.Node) and isinstance(gate, fx.Node)
    smooth = gate.args[0] if gate.args else None
    quantizers = [modules.get(str(node.target)) for node in (before, gate, last)]
    if not isinstance(smooth, fx.Node) or not isinstance(modules.get(str(smooth.target)), nn.Sigmoid):
        return
    inner = {before: 2, gate: 1, smooth: 1, product: 1}
    if smooth.args[0] is not before or any(len(node.users) != count for node, count in inner.items()):
        return
    found = [quantizer for quantizer in quantizers if isinstance(quantizer, Quantizer)]
    if len(found) != len(quantizers):
        return
    name = f"{str(product.target).rpartition('.')[0]}.fused"
    graph.add_submodule(name, FusedSilu(found))
    with graph.graph.inserting_after(last):
        call = graph.graph.call_module(name, (before.args[0],))
    last.replace_all_uses_with(call)
    for node in (last, product, gate, smooth, before):
        graph.graph.erase_node(node)
