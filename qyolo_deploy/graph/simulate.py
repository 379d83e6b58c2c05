"""The torch views of a detector: float with batch normalisation folded, and the fake-quantized `QuantizedModel`."""

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, fx, nn

from qyolo_deploy.graph.layers import convolution_like
from qyolo_deploy.graph.logistic import logistic
from qyolo_deploy.graph.ops import Add, Mul, only_repeats
from qyolo_deploy.graph.trace import trace
from qyolo_deploy.models.base import Detector
from qyolo_deploy.quant.model import QuantizedLayer, QuantizedModel
from qyolo_deploy.quant.qparams import QParams


class FixedQuantizer(nn.Module):
    """Rounds an activation with fixed scale and zero point, with the arithmetic of ONNX QuantizeLinear.

    Args:
        qparams: Per-tensor parameters.
        rounds: False only clips to the range of the grid.
    """

    def __init__(self, qparams: QParams, rounds: bool = True) -> None:
        super().__init__()
        self.rounds = rounds
        self.scale = float(qparams.scale)
        self.low = qparams.spec.qmin - int(qparams.zero_point)
        self.high = qparams.spec.qmax - int(qparams.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Float32 of any shape to float32 of the same shape."""
        return self.from_codes(torch.div(x, self.scale))

    def from_codes(self, x: Tensor) -> Tensor:
        """The same for values that are in steps already; changes them in place."""
        return (x.round_() if self.rounds else x).clamp_(self.low, self.high).mul_(self.scale)


class IntegerConv(nn.Module):
    """A quantized convolution in the arithmetic of the integer kernels, with float32 as the carrier of integers.

    Float32 holds integers up to 2^24 exactly, so the accumulator is that of int32; the result is scaled by
    `s_x * s_w / s_y`, rounded half to even and clipped, in the order in which ONNX Runtime's QLinearConv does it.
    A convolution of dequantized values would round differently near ties, and one flipped code in a million in an
    early layer reaches half of the codes of the last one.

    Args:
        conv: The geometry.
        layer: Integers and weight scales.
        source: Parameters of the input.
        target: What becomes of the output; None leaves it as the accumulator has it.
    """

    weight: Tensor
    bias: Tensor
    ratio: Tensor

    def __init__(self, conv: nn.Conv2d, layer: QuantizedLayer, source: QParams, target: FixedQuantizer | None) -> None:
        super().__init__()
        self.convolve = convolution_like(conv)
        self.register_buffer("weight", torch.from_numpy(layer.weight.astype(np.float32)))
        self.register_buffer("bias", torch.from_numpy(layer.bias.astype(np.float32)))
        ratio = source.scale * layer.qparams.scale
        self.input_scale = float(source.scale)
        self.output = target
        if target is not None:
            ratio = ratio / np.float32(target.scale)
        self.register_buffer("ratio", torch.from_numpy(ratio)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Float32 `[N, C_in, H, W]` on the input's grid to float32 `[N, C_out, H', W']` on the output's."""
        codes = torch.round(x / self.input_scale)
        sums = self.convolve(codes, self.weight)
        sums += self.bias[:, None, None]
        sums *= self.ratio
        return sums if self.output is None else self.output.from_codes(sums)


class IntegerAdd(nn.Module):
    """The sum of two quantized tensors in the arithmetic of ONNX Runtime's QLinearAdd.

    `fma(a, r_a, fma(b, r_b, z_c - fma(z_a, r_a, z_b r_b)))` on codes with `r_a = s_a / s_c`; a plain sum of dequantized
    values breaks a few of 65,536 ties otherwise, which is enough to reach every code of an image's last layer.

    Args:
        sources: Parameters of the terms.
        target: Parameters of the sum.
    """

    def __init__(self, sources: tuple[QParams, QParams], target: QParams) -> None:
        super().__init__()
        self.scales = tuple(float(source.scale) for source in sources)
        self.zeros = tuple(_container_zero(source) for source in sources)
        self.ratios = tuple(np.float32(source.scale) / np.float32(target.scale) for source in sources)
        zero = _container_zero(target)
        shares = float(self.zeros[0]) * float(self.ratios[0]) + float(np.float32(self.zeros[1] * self.ratios[1]))
        self.constant = float(np.float32(zero) - np.float32(shares))
        self.zero, self.output = zero, FixedQuantizer(target)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Float32 of one shape on the sources' grids to float32 on the target's."""
        total = torch.tensor(self.constant, dtype=torch.float64)
        for x, scale, zero, ratio in reversed(
            list(zip((left, right), self.scales, self.zeros, self.ratios, strict=True))
        ):
            codes = torch.round(x / scale).double() + zero
            total = (codes * float(ratio) + total).float().double()  # one rounding, as a fused multiply-add has
        return self.output.from_codes((total.round() - self.zero).float())


class IntegerMul(nn.Module):
    """The product of two quantized tensors in the arithmetic of ONNX Runtime's QLinearMul.

    `round(a b r + z_c)` on codes without their zero points, with `r = s_a s_b / s_c`, each operation rounded to
    float32.

    Args:
        sources: Parameters of the factors.
        target: Parameters of the product.
    """

    def __init__(self, sources: tuple[QParams, QParams], target: QParams) -> None:
        super().__init__()
        self.scales = tuple(float(source.scale) for source in sources)
        left, right = (np.float32(source.scale) for source in sources)
        self.ratio = float(left * right / np.float32(target.scale))
        self.zero, self.output = _container_zero(target), FixedQuantizer(target)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Float32 of one shape on the sources' grids to float32 on the target's."""
        product = torch.round(left / self.scales[0]).mul_(torch.round(right / self.scales[1]))
        return self.output.from_codes(product.mul_(self.ratio).add_(self.zero).round_().sub_(self.zero))


class IntegerSigmoid(nn.Module):
    """The sigmoid of a quantized tensor: a table from codes to codes, as in ONNX Runtime's QLinearSigmoid.

    Args:
        source: Parameters of the input.
        target: Parameters of the output.
    """

    table: Tensor

    def __init__(self, source: QParams, target: QParams) -> None:
        super().__init__()
        self.scale = float(source.scale)
        self.low = source.spec.qmin - int(source.zero_point)
        steps = np.arange(source.spec.qmin, source.spec.qmax + 1, dtype=np.float32) - np.float32(source.zero_point)
        values = torch.from_numpy(logistic(steps * np.float32(source.scale)))
        self.register_buffer("table", FixedQuantizer(target)(values))

    def forward(self, x: Tensor) -> Tensor:
        """Float32 of any shape on the input's grid to float32 on the output's."""
        return self.table[torch.round(x / self.scale).sub_(self.low).long()]


def _container_zero(qparams: QParams) -> int:
    """The zero point in the 8-bit container, at whose top the codes of fewer bits lie."""
    spec = qparams.spec
    top = np.iinfo(np.int8 if spec.signed else np.uint8).max
    return int(qparams.zero_point) + int(top) - spec.qmax


class View(nn.Module):
    """A core and a decode without anything that learns: images to `output0`.

    Args:
        core: float32 `[N, 3, H, W]` in 0..1 to raw head maps.
        decode: Raw head maps to float32 `[N, 4 + nc, A]`.
    """

    def __init__(self, core: nn.Module, decode: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.decode = decode

    def forward(self, images: Tensor) -> Tensor:
        """Detects."""
        output: Tensor = self.decode(self.core(images))
        return output


def fold_float(detector: Detector) -> View:
    """The float network as it is exported: traced, batch normalisation folded into the convolutions.

    It shares nothing with the detector's core, so that it may be changed.
    """
    traced = trace(deepcopy(detector.core).eval())
    fold_norms(traced)
    return View(traced.eval(), detector.decode).eval()


@torch.no_grad()
def fold_norms(traced: fx.GraphModule) -> None:
    """Folds batch normalisation into the convolutions of a traced network, in place."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        source = node.args[0] if node.args else None
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(source, fx.Node):
            continue
        conv = modules.get(str(source.target))
        if isinstance(conv, nn.Conv2d) and len(source.users) == 1:
            traced.add_submodule(str(source.target), _fused(conv, norm))
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.recompile()


def _fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    bias = conv.bias.double() if conv.bias is not None else torch.zeros(conv.out_channels, dtype=torch.float64)
    fused = deepcopy(conv)
    fused.weight = nn.Parameter((conv.weight.double() * factor[:, None, None, None]).float())
    fused.bias = nn.Parameter((norm.bias.double() + (bias - norm.running_mean.double()) * factor).float())
    return fused


@torch.no_grad()
def simulate(detector: Detector, quantized: QuantizedModel, leave_out: frozenset[str] = frozenset()) -> View:
    """The fake-quantized view of the integers: convolutions in integer arithmetic, every tensor rounded.

    Args:
        detector: The architecture; its weights are not used.
        quantized: The integers.
        leave_out: Tensors that a runtime does not round; convolutions' outputs among them are clipped all the same.
    """
    view = fold_float(detector)
    core = view.core
    assert isinstance(core, fx.GraphModule)
    for name, layer in quantized.layers.items():
        conv = core.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        source, grid = quantized.activations[layer.input], _grid_behind(core, name, quantized)
        target = None if grid is None else FixedQuantizer(grid, rounds=name not in leave_out)
        core.add_submodule(name, IntegerConv(conv, layer, source, target))
    for name, value in quantized.float_tensors.items():
        layer_name, _, key = name.rpartition(".")
        setattr(core.get_submodule(layer_name), key, nn.Parameter(torch.from_numpy(value)))
    for node in list(core.graph.nodes):
        name = str(node.target)
        if name in quantized.activations and name not in quantized.layers and name not in leave_out:
            _round_node(core, node, quantized, leave_out)
    core.recompile()
    return view.eval()


def _grid_behind(core: fx.GraphModule, name: str, quantized: QuantizedModel) -> QParams | None:
    """Grid of a convolution's output, which is that behind the ReLU where both are one kernel."""
    if name in quantized.activations:
        return quantized.activations[name]
    (node,) = core.graph.find_nodes(op="call_module", target=name)
    readers = list(node.users)
    is_relu = len(readers) == 1 and isinstance(core.get_submodule(str(readers[0].target)), nn.ReLU)
    return quantized.activations.get(str(readers[0].target)) if is_relu else None


def _round_node(core: fx.GraphModule, node: fx.Node, quantized: QuantizedModel, leave_out: frozenset[str]) -> None:
    """Sums, products and sigmoids of rounded tensors are computed in integers, what else is rounded in float first."""
    name, target = str(node.target), quantized.activations[str(node.target)]
    terms = [_tensor_behind(source) for source in node.all_input_nodes]
    rounded = [term for term in terms if term in quantized.activations and term not in leave_out]
    sources = [quantized.activations[term] for term in rounded]
    module = dict(core.named_modules()).get(name)
    if isinstance(module, Add | Mul) and len(sources) == len(node.args) == 2:
        kind = IntegerAdd if isinstance(module, Add) else IntegerMul
        core.add_submodule(name, kind((sources[0], sources[1]), target))
    elif isinstance(module, nn.Sigmoid) and len(sources) == 1:
        core.add_submodule(name, IntegerSigmoid(sources[0], target))
    else:
        _round_after(core, node, target)


def _tensor_behind(node: fx.Node) -> str:
    """Name of the tensor that a node passes on: a part of a split one has the whole one's grid."""
    while only_repeats(node):
        node = node.all_input_nodes[0]
    return str(node.target).removeprefix("quantizers.")


def _round_after(core: fx.GraphModule, node: fx.Node, qparams: QParams) -> None:
    name = f"quantizers.{node.target}"
    core.add_submodule(name, FixedQuantizer(qparams))
    with core.graph.inserting_after(node):
        call = core.graph.call_module(name, (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
