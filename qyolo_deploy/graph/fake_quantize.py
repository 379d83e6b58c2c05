"""Learned step size quantization: rounding forward, straight-through backward, gradients to scale and offset."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qyolo_deploy.quant.spec import QuantSpec

logger = logging.getLogger(__name__)

MIN_SCALE = 1e-8


def _forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`s * clip(round(x / s), low, high)`; a true division, as ONNX QuantizeLinear does."""
    return torch.minimum(torch.maximum(torch.round(x / scale), low), high) * scale


def _backward(grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, scale and offset (LSQ, Esser 2020, eq. 3; LSQ+, Bhalgat 2020, eq. 4-5).

    `low` and `high` are the ends of the grid counted from zero, so with an offset (`low = qmin - z`) the upper end
    is `s * qmax + offset`, whose derivative to s is qmax: the caller adds what z contributes.
    """
    ratio = x / scale
    rounded = torch.round(ratio)
    below, above = rounded < low, rounded > high
    inside = ~(below | above)
    to_x = grad * inside
    to_scale = grad * torch.where(below, low, torch.where(above, high, rounded - ratio))
    to_offset = grad * ~inside
    return to_x, _sum_to(to_scale, scale.shape), _sum_to(to_offset, scale.shape)


def _sum_to(values: Tensor, shape: torch.Size) -> Tensor:
    return values.sum(1, keepdim=True) if shape else values.sum()


@cache
def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
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


class _FakeQuantize(torch.autograd.Function):
    """Autograd glue around the two kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int) -> Tensor:
        zero_point = zero_point_of(scale, offset, qmin, qmax)
        low, high = qmin - zero_point, qmax - zero_point
        ctx.save_for_backward(x, scale, low, high, zero_point)
        # Detached: the compiler specialises on whether a tensor is a view and needs gradients, and gives up after
        # eight kinds.
        rounded: Tensor = _kernel(_forward)(x.detach(), scale.detach(), low, high)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, scale, low, high, zero_point = ctx.saved_tensors
        arguments = (tensor.detach() for tensor in (grad.contiguous(), x, scale, low, high))
        to_x, to_scale, to_offset = _kernel(_backward)(*arguments)
        # d(s * high)/ds with offset held fixed is qmax = high + z, hence the second term.
        return to_x, to_scale + zero_point * to_offset, to_offset, None, None


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
    return _forward(x, scale[:, None], spec.qmin - zero_point, spec.qmax - zero_point)


def _apply(x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int) -> Tensor:
    output: Tensor = _FakeQuantize.apply(x, scale, offset, qmin, qmax)  # type: ignore[no-untyped-call]
    return output


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec) -> Tensor:
    """Rounds to the grid, differentiable in all three tensors.

    Args:
        x: float32, any shape; channels first where there is a scale per channel.
        scale: float32 `[]` or `[C]`.
        offset: float32 of the scale's shape; zeros make the grid symmetric.
        spec: The grid.

    Returns:
        float32 of x's shape: `s * (clip(round(x / s) + z, qmin, qmax) - z)` with `z = round(-offset / s)`.
    """
    if scale.ndim:  # a fixed number of axes, so that each kernel is compiled once
        flat = _apply(x.flatten(1), scale[:, None], offset[:, None], spec.qmin, spec.qmax)
    else:
        flat = _apply(x.flatten(), scale, offset, spec.qmin, spec.qmax)
    return flat.view(x.shape)


class Quantizer(nn.Module):
    """A learned quantizer: scale and, for unsigned grids, offset (LSQ and LSQ+).

    Args:
        spec: The grid.
        channels: Length of scale and offset of a per-channel grid.
    """

    def __init__(self, spec: QuantSpec, channels: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True
        shape = (channels,) if spec.granularity == "per_channel" else ()
        self.scale = nn.Parameter(torch.ones(shape))
        self.offset = nn.Parameter(torch.zeros(shape), requires_grad=not spec.signed)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantizes, or passes on while it is switched off."""
        if not self.enabled:
            return x
        return fake_quantize(x, self.scale, self.offset, self.spec)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings scale and offset back to where they mean something, after an optimizer step."""
        self.scale.clamp_(min=MIN_SCALE)
        span = self.scale * (self.spec.qmax - self.spec.qmin)
        self.offset.copy_(torch.minimum(torch.maximum(self.offset, -span), torch.zeros_like(span)))
