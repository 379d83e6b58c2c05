"""Learned step size quantization: rounding forward, straight-through backward, gradients to scale and offset."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qyolo_deploy.quant.spec import QuantSpec

logger = logging.getLogger(__name__)

MIN_SCALE = 1e-8


def round_values(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`s * clip(round(x / s), low, high)`; a true division, as ONNX QuantizeLinear does."""
    return torch.minimum(torch.maximum(torch.round(x / scale), low), high) * scale


def elementwise_backward(
    grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What each element contributes to the gradients to x, scale and offset.

    LSQ, Esser 2020, eq. 3; LSQ+, Bhalgat 2020, eq. 4-5. `low` and `high` are the ends of the grid counted from
    zero, so with an offset (`low = qmin - z`) the upper end is `s * qmax + offset`, whose derivative to s is qmax:
    the caller adds what z contributes.

    Args:
        grad: Gradient to the rounded values.
        x: The values.
        scale: Step size, broadcastable to x.
        low: Lowest level, in steps.
        high: Highest level, in steps.
        reach: Largest distance to a level, in steps, at which a value still moves the scale; 0.5 leaves none out.
    """
    ratio = x / scale
    error = torch.round(ratio) - ratio
    below, above = ratio < low, ratio > high
    inside = ~(below | above)
    near = torch.where(error.abs() <= reach, error, 0.0)
    to_scale = grad * torch.where(below, low, torch.where(above, high, near))
    return grad * inside, to_scale, grad * ~inside


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    to_x, to_scale, to_offset = elementwise_backward(grad, x, scale, low, high, reach)
    return to_x, _sum_to(to_scale, scale.shape), _sum_to(to_offset, scale.shape)


def _sum_to(values: Tensor, shape: torch.Size) -> Tensor:
    return values.sum(1, keepdim=True) if shape else values.sum()


@cache
def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled into one loop, or as it is where there is no compiler.

    Values and gradients to x are the same in both; the sums for scale and offset differ in their last bits.
    """
    compiled = torch.compile(function, dynamic=True)
    state = {"call": compiled}

    def call(*args: Tensor) -> Any:
        try:
            return state["call"](*args)
        except (
            RuntimeError,
            OSError,
        ) as error:  # torch wraps every failure of the C++ compiler in a RuntimeError
            if state["call"] is function:
                raise
            logger.warning("no compiled fake quantization, training runs slower (%s)", type(error).__name__)
            state["call"] = function
            return function(*args)

    return call


@dataclass(frozen=True)
class GradientRules:
    """What is done to gradients beyond the straight-through rule; by default nothing.

    Attributes:
        lsq_scale: Multiply the gradient to scale and offset by `1 / sqrt(N * qmax)` (Esser 2020, section 2.2).
        margin: Values within this many steps of a rounding threshold do not move the scale (stability-driven QAT).
        latent_damping: k in the factor `exp(-k |round(w / s) - w / s|)` on the gradient to latent weights.
    """

    lsq_scale: bool = False
    margin: float = 0.0
    latent_damping: float = 0.0

    def reach(self, device: torch.device) -> Tensor:
        """The margin as the distance to a level at which a value still counts, float32 `[]`."""
        return torch.tensor(0.5 - self.margin, device=device)

    def scale_factor(self, features: int, spec: QuantSpec) -> float:
        """Factor of the gradient to scale and offset; `features` are weights, or those of one image."""
        return 1 / math.sqrt(features * spec.qmax) if self.lsq_scale else 1.0


PLAIN = GradientRules()


class _FakeQuantize(torch.autograd.Function):
    """Autograd glue around the two kernels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec, rules: GradientRules, features: int
    ) -> Tensor:
        zero_point = zero_point_of(scale, offset, spec.qmin, spec.qmax)
        low, high = spec.qmin - zero_point, spec.qmax - zero_point
        ctx.save_for_backward(x, scale, low, high, zero_point)
        ctx.rules, ctx.factor = rules, rules.scale_factor(features, spec)
        # Detached: the compiler specialises on whether a tensor is a view and needs gradients, and gives up after
        # eight kinds.
        rounded: Tensor = kernel(round_values)(x.detach(), scale.detach(), low, high)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, scale, low, high, zero_point = ctx.saved_tensors
        arguments = (tensor.detach() for tensor in (grad.contiguous(), x, scale, low, high))
        to_x, to_scale, to_offset = kernel(_backward)(*arguments, ctx.rules.reach(x.device))
        if ctx.rules.latent_damping:
            ratio = x / scale
            to_x = to_x * torch.exp(-ctx.rules.latent_damping * (torch.round(ratio) - ratio).abs())
        # d(s * high)/ds with offset held fixed is qmax = high + z, hence the second term.
        to_scale = (to_scale + zero_point * to_offset) * ctx.factor
        return to_x, to_scale, to_offset * ctx.factor, None, None, None


def zero_point_of(scale: Tensor, offset: Tensor, qmin: int, qmax: int) -> Tensor:
    """Integer that stands for 0.0: the offset's place on the grid, so that padding stays exact.

    Args:
        scale: float32, any shape.
        offset: float32 of the same shape, the real value that integer 0 stands for.
        qmin: Lowest integer.
        qmax: Highest integer.
    """
    return torch.clamp(torch.round(-offset / scale), qmin, qmax)


@torch.no_grad()
def round_to_grid(x: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec) -> Tensor:
    """What `fake_quantize` gives, without gradients and without compiling anything.

    Args:
        x: float32 `[rows, n]`.
        scale: float32 `[rows]`.
        offset: float32 `[rows]`.
        spec: The grid.
    """
    zero_point = zero_point_of(scale, offset, spec.qmin, spec.qmax)[:, None]
    return round_values(x, scale[:, None], spec.qmin - zero_point, spec.qmax - zero_point)


def _apply(x: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec, rules: GradientRules, features: int) -> Tensor:
    output: Tensor = _FakeQuantize.apply(x, scale, offset, spec, rules, features)  # type: ignore[no-untyped-call]
    return output


def fake_quantize(
    x: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec, rules: GradientRules = PLAIN, features: int = 1
) -> Tensor:
    """Rounds to the grid, differentiable in all three tensors.

    Args:
        x: float32, any shape; channels first where there is a scale per channel.
        scale: float32 `[]` or `[C]`.
        offset: float32 of the scale's shape; zeros make the grid symmetric.
        spec: The grid.
        rules: What is done to the gradients.
        features: N of LSQ's gradient scale: the weights of a scale, or its features in one image.

    Returns:
        float32 of x's shape: `s * (clip(round(x / s) + z, qmin, qmax) - z)` with `z = round(-offset / s)`.
    """
    if scale.ndim:  # a fixed number of axes, so that each kernel is compiled once
        flat = _apply(x.flatten(1), scale[:, None], offset[:, None], spec, rules, features)
    else:
        flat = _apply(x.flatten(), scale, offset, spec, rules, features)
    return flat.view(x.shape)


class Quantizer(nn.Module):
    """A learned quantizer: scale and, for unsigned grids, offset (LSQ and LSQ+).

    Args:
        spec: The grid.
        channels: Output channels of the weights that it quantizes; 0 for activations.
        offset: Whether an unsigned grid may reach below 0; without it the offset stays 0.
    """

    def __init__(self, spec: QuantSpec, channels: int = 0, offset: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True
        self.rules = PLAIN
        shape = (channels,) if spec.granularity == "per_channel" else ()
        self._weight_scales = math.prod(shape) if channels else 0
        self.scale = nn.Parameter(torch.ones(shape))
        self.offset = nn.Parameter(torch.zeros(shape), requires_grad=offset and not spec.signed)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantizes, or passes on while it is switched off."""
        if not self.enabled:
            return x
        return fake_quantize(x.float(), self.scale, self.offset, self.spec, self.rules, self.features_of(x))

    def features_of(self, x: Tensor) -> int:
        """N of LSQ's gradient scale: elements for each scale; of activations those of one image."""
        return x.numel() // self._weight_scales if self._weight_scales else x[0].numel()

    def scale_factor(self, x: Tensor) -> float:
        """What the rules multiply gradients to the scale by."""
        return self.rules.scale_factor(self.features_of(x), self.spec)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings scale and offset back to where they mean something, after an optimizer step."""
        self.scale.clamp_(min=MIN_SCALE)
        span = self.scale * (self.spec.qmax - self.spec.qmin)
        self.offset.copy_(torch.minimum(torch.maximum(self.offset, -span), torch.zeros_like(span)))
