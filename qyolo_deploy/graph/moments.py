"""Corrects what quantization does to the mean and spread of every channel, in closed form.

Clipping takes away variance and rounding moves means (Nagel et al. 2019, "Data-Free Quantization Through Weight
Equalization and Bias Correction", section 4.2, corrects the means). Both are per-channel affine errors, so what
undoes them folds into scale and bias like batch normalisation itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from qyolo_deploy.graph.compensate import compensate_
from qyolo_deploy.graph.layers import QuantConv
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.graph.simulate import fold_float
from qyolo_deploy.models.base import Detector

_GAIN_LIMITS = (0.5, 2.0)  # a channel that hardly varies says nothing about its spread
_EPS = 1e-6

Moments = tuple[Tensor, Tensor]
"""Mean and standard deviation of each channel, float32 `[C_out]`."""


@torch.no_grad()
def match_moments(model: PreparedModel, detector: Detector, images: Tensor, compensated: bool = False) -> None:
    """Gives every convolution's output the mean and spread that it has in the float network.

    One pass from the first layer to the last, in which each layer already reads what those before it were corrected
    to.

    Args:
        model: Calibrated; changed in place.
        detector: The float network of the same architecture.
        images: float32 `[N, 3, H, W]` in 0..1, from the training split.
        compensated: Round each layer's weights with `compensate_` first.
    """
    wanted = _float_moments(detector, images, set(model.convs()))
    handles = [conv.register_forward_hook(_corrector(wanted[name])) for name, conv in model.convs().items()]
    if compensated:
        generator = torch.Generator().manual_seed(0)
        handles += [
            conv.register_forward_pre_hook(lambda conv, inputs: compensate_(conv, inputs[0], generator))
            for conv in model.convs().values()
            if conv.quantizer is not None
        ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()


def _moments(x: Tensor) -> Moments:
    return x.mean((0, 2, 3)), x.std((0, 2, 3))


def _float_moments(detector: Detector, images: Tensor, names: set[str]) -> dict[str, Moments]:
    core = fold_float(detector).core
    assert isinstance(core, fx.GraphModule)
    found: dict[str, Moments] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, __, output: found.__setitem__(name, _moments(output))

    for name in names:
        core.get_submodule(name).register_forward_hook(hook_of(name))
    core(images)
    return found


def _corrector(wanted: Moments) -> Callable[[QuantConv, tuple[Tensor, ...], Tensor], Tensor]:
    def correct(conv: QuantConv, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        mean, spread = _moments(output)
        gain = (wanted[1] / spread.clamp_min(_EPS)).clamp(*_GAIN_LIMITS)
        shift = wanted[0] - gain * mean
        conv.adopt_statistics_(mean, spread)
        conv.rescale_(gain, shift)
        return output * gain[:, None, None] + shift[:, None, None]

    return correct
