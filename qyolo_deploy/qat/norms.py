"""Re-estimation of batch normalisation, and how far its running statistics were off."""

from collections.abc import Iterable

import torch
from torch import Tensor

from qyolo_deploy.graph.layers import QuantConv
from qyolo_deploy.graph.prepare import PreparedModel


def normalised(model: PreparedModel) -> dict[str, QuantConv]:
    """The convolutions with batch normalisation, by name."""
    return {name: conv for name, conv in model.convs().items() if conv.has_norm}


def use_batch_statistics(model: PreparedModel, momentum: float | None) -> None:
    """Lets batch normalisation use each batch's statistics and follow them with a momentum; None ends it."""
    for conv in normalised(model).values():
        conv.norm_momentum = momentum


@torch.no_grad()
def reestimate(model: PreparedModel, batches: Iterable[Tensor]) -> dict[str, float]:
    """Replaces the running statistics by the mean of the batches' (Nagel 2022, section 4.1).

    Args:
        model: Trained; changed in place.
        batches: float32 `[N, 3, H, W]` in 0..1.

    Returns:
        For each layer the divergence of the running statistics from the new ones, a mean over channels.
    """
    before = {name: (conv.mean.clone(), conv.var.clone()) for name, conv in normalised(model).items()}
    try:
        for count, images in enumerate(batches):
            use_batch_statistics(model, 1 / (count + 1))
            model(images)
    finally:
        use_batch_statistics(model, None)
    return {
        name: divergence(*before[name], conv.mean, conv.var).mean().item() for name, conv in normalised(model).items()
    }


def divergence(mean: Tensor, var: Tensor, true_mean: Tensor, true_var: Tensor) -> Tensor:
    """KL from the running to the population distribution of each channel, both taken as normal.

    `log(s2 / s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2` (Nagel 2022, section 3.2).
    """
    spread = torch.log(true_var / var) / 2
    return spread + (var + (mean - true_mean).square()) / (2 * true_var) - 0.5
