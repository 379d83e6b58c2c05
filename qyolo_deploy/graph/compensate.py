"""Rounds weights so that those still to come make up for the error of those before them.

GPTQ (Frantar et al. 2022, 2210.17323, algorithm 1) on convolutions: rounding column by column in the order of what
the inputs weigh, the error of each spread over the rest by the inverse Hessian of the layer's squared error.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qyolo_deploy.graph.layers import QuantConv

_DAMPING = 0.01  # of the mean of the diagonal, as in the paper
_POSITIONS = 16384  # at which the output of a layer is looked at; several times what a column of weights has


@torch.no_grad()
def compensate_(conv: QuantConv, x: Tensor, generator: torch.Generator) -> None:
    """Moves the weights of a layer so that, rounded, they give nearly the least error of its output.

    They stay between the levels, where the spread errors brought them: on a level, training would have to carry each
    weight half a step before anything changes. Means are left aside: a shift behind the layer takes them back.

    Args:
        conv: Calibrated and quantized; its scale stays.
        x: What it reads, float32 `[N, C_in, H, W]`.
        generator: Chooses the positions that are looked at.
    """
    assert conv.quantizer is not None
    spec = conv.quantizer.spec
    patches = _patches(conv, x, generator)
    groups, _, columns = patches.shape
    weight = conv.weight.double().reshape(groups, -1, columns)
    scale = conv.weight_scale().double().expand(len(conv.weight), 1, 1, 1).reshape(groups, -1)
    hessian = _hessian(patches)
    order = hessian.diagonal(dim1=1, dim2=2).sum(0).argsort(descending=True)
    factor = _inverse_factor(hessian[:, order][:, :, order])
    latent = _spread_errors(weight[:, :, order], factor, scale, spec.qmin, spec.qmax)
    conv.weight.copy_(latent[:, :, order.argsort()].reshape(conv.weight.shape))


def _patches(conv: QuantConv, x: Tensor, generator: torch.Generator) -> Tensor:
    """What single outputs are computed from, float32 `[groups, positions, C_in / groups * kH * kW]`."""
    geometry = conv.convolve.keywords
    shares = {name: geometry[name] for name in ("dilation", "padding", "stride")}
    found = []
    for image in torch.split(x, 1):
        columns = F.unfold(image, conv.weight.shape[2:], **shares)[0]
        chosen = torch.randperm(columns.shape[1], generator=generator)[: max(1, _POSITIONS // len(x))]
        found.append(columns[:, chosen].T)
    stacked = torch.cat(found)
    return stacked.reshape(len(stacked), geometry["groups"], -1).transpose(0, 1)


def _hessian(patches: Tensor) -> Tensor:
    """Damped covariance of the inputs, float64 `[groups, columns, columns]`."""
    centred = patches - patches.mean(1, keepdim=True)
    hessian = torch.matmul(centred.transpose(1, 2), centred).double()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal += (_DAMPING * diagonal.mean(1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    return hessian


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse."""
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    return factor


def _spread_errors(weight: Tensor, factor: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """What `[groups, rows, columns]` are just before rounding with step `[groups, rows]`, first column first."""
    latent = weight.clone()
    for column in range(weight.shape[2]):
        value = latent[:, :, column] / scale
        level = torch.round(value).clamp_(qmin, qmax)
        error = (value - level) * scale / factor[:, column, column, None]
        latent[:, :, column + 1 :] -= error[:, :, None] * factor[:, None, column, column + 1 :]
        latent[:, :, column] = value.clamp(qmin, qmax) * scale
    return latent
