"""A convolution with a quantized weight, its batch normalisation and its correction as one module."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qyolo_deploy.graph.fake_quantize import Quantizer
from qyolo_deploy.quant.spec import QuantSpec

# Keeps folded scales positive: a channel whose factor reached zero could not be folded into a scale.
MIN_GAMMA = 1e-6
_DEAD_SHARE = 1e-3


def convolution_like(conv: nn.Conv2d) -> partial[Tensor]:
    """The function `conv2d(x, weight, bias=None)` with a module's stride, padding, dilation and groups."""
    geometry = {key: getattr(conv, key) for key in ("stride", "padding", "dilation", "groups")}
    return partial(F.conv2d, **geometry)


class QuantConv(nn.Module):
    """`beta + gamma * ((gain * conv(x, q(w)) + shift) - mean) / sqrt(var + eps)`.

    Batch normalisation uses its running statistics and learns its weight and bias; gain and shift are those of
    quantization correction (Gupta and Asthana, 2311.05109, section 3) and are 1 and 0 until it runs. Everything
    after the convolution is affine per channel, so the forward pass multiplies it into the weights.

    Args:
        conv: The float convolution.
        norm: Its batch normalisation, if it has one.
        spec: Grid of the weights; None keeps the layer in float.

    Attributes:
        norm_momentum: With a number, batch normalisation uses the statistics of the batch and moves the running ones
            towards them by that share; None uses the running ones.
        frozen: Mask of the weights that do not follow their latent values, and a function that gives levels for them,
            in steps; both of the weight's shape.
        source: Quantizer of what the layer reads, once it is known; biases are then rounded as the int32 ones of an
            engine are. In a tuple, as the module belongs to the graph and not to the layer.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, spec: QuantSpec | None) -> None:
        super().__init__()
        channels = conv.out_channels
        self.convolve = convolution_like(conv)
        self.has_norm, self.eps = norm is not None, norm.eps if norm is not None else 0.0
        weight = conv.weight.detach().clone()
        bias = conv.bias.detach().clone() if conv.bias is not None else torch.zeros(channels)
        gamma, beta, mean, var = torch.ones(channels), bias, torch.zeros(channels), torch.ones(channels)
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            # A negative gamma would fold into a negative scale, so its sign moves into weights, bias and mean.
            sign = torch.where(norm.weight.detach() < 0, -1.0, 1.0)
            weight = weight * sign[:, None, None, None]
            gamma = (norm.weight.detach() * sign).clamp_(min=MIN_GAMMA)
            beta = norm.bias.detach().clone()
            mean, var = (norm.running_mean - bias) * sign, norm.running_var.clone()
        self.weight = nn.Parameter(weight)
        self.gamma = nn.Parameter(gamma, requires_grad=self.has_norm)
        self.beta = nn.Parameter(beta)
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)
        self.log_gain = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.quantizer = Quantizer(spec, channels) if spec is not None else None
        self.norm_momentum: float | None = None
        self.frozen: tuple[Tensor, Callable[[], Tensor]] | None = None
        self.source: tuple[Quantizer, ...] = ()

    def affine(self) -> tuple[Tensor, Tensor]:
        """Factor and bias, each `[C_out]`, of what follows the convolution."""
        gain = torch.exp(self.log_gain)
        if not self.has_norm:
            return gain, gain * self.beta + self.shift
        slope = self.gamma * torch.rsqrt(self.var + self.eps)
        return slope * gain, self.beta + (self.shift - self.mean) * slope

    def forward(self, x: Tensor) -> Tensor:
        """Float32 `[N, C_in, H, W]` to `[N, C_out, H', W']`."""
        weight = self.quantized_weight()
        if self.has_norm and self.norm_momentum is not None:
            return self._normalise(self.convolve(x, weight), self.norm_momentum)
        factor, bias = self.affine()
        return self.convolve(x, weight * factor[:, None, None, None], self._rounded(bias, factor))

    def _rounded(self, bias: Tensor, factor: Tensor) -> Tensor:
        """The bias in whole steps of the accumulator, which are input scale times folded weight scale."""
        if self.quantizer is None or not self.source:
            return bias
        (source,) = self.source
        if not (source.enabled and self.quantizer.enabled):
            return bias
        with torch.no_grad():
            step = source.scale * self.weight_scale().flatten() * factor
            rounded = torch.round(bias / step) * step
        return bias + (rounded - bias).detach()

    def quantized_weight(self) -> Tensor:
        """The weights on their grid, float32 `[C_out, C_in / groups, kH, kW]`; of a float layer as they are."""
        if self.quantizer is None:
            return self.weight
        weight: Tensor = self.quantizer(self.weight)
        if self.frozen is None or not self.quantizer.enabled:
            return weight
        mask, levels = self.frozen
        scale, factor = self.weight_scale(), self.quantizer.scale_factor(self.weight)
        learning = scale.detach() + (scale - scale.detach()) * factor
        # In the integer domain, so that the scale goes on learning (Nagel 2022, section 4.3).
        return torch.where(mask, levels() * learning, weight)

    def weight_scale(self) -> Tensor:
        """Step size of the weights, broadcastable to them."""
        assert self.quantizer is not None
        return self.quantizer.scale.reshape(-1, 1, 1, 1)

    def _normalise(self, x: Tensor, momentum: float) -> Tensor:
        """Batch normalisation by the statistics of the batch; gain and shift are not learned in this mode."""
        return F.batch_norm(
            x, self.mean, self.var, self.gamma, self.beta, training=True, momentum=momentum, eps=self.eps
        )

    @torch.no_grad()
    def adopt_statistics_(self, mean: Tensor, spread: Tensor) -> None:
        """Makes the statistics of some output the running ones, without changing the function.

        Afterwards beta and gamma are the output's mean and spread, so that running statistics may be estimated again.

        Args:
            mean: Of each output channel, float32 `[C_out]`.
            spread: Standard deviation of each output channel.
        """
        if not self.has_norm:
            return
        slope = self.gamma * torch.rsqrt(self.var + self.eps)
        var = (spread / slope).square() - self.eps
        alive = var > _DEAD_SHARE * self.var  # a channel that does not vary has no statistics to adopt
        self.mean.copy_(torch.where(alive, self.mean + (mean - self.beta) / slope, self.mean))
        self.beta.copy_(torch.where(alive, mean, self.beta))
        self.gamma.copy_(torch.where(alive, spread, self.gamma))
        self.var.copy_(torch.where(alive, var, self.var))

    @torch.no_grad()
    def rescale_(self, gain: Tensor, shift: Tensor) -> None:
        """Makes the output `gain * output + shift`; gain is positive, both are `[C_out]`."""
        if self.has_norm:
            self.gamma.mul_(gain)
            self.beta.mul_(gain).add_(shift)
        else:
            self.log_gain.add_(gain.log())
            self.shift.mul_(gain).add_(shift)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keeps gamma positive, so that it can be folded into a scale, after an optimizer step."""
        if self.has_norm:
            self.gamma.clamp_(min=MIN_GAMMA)
