"""Soft rounding: weights whose level is undecided keep their latent value when a model is evaluated."""

import torch

from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.qat.oscillation import fixed

REACH = 0.45
"""Largest distance to a level, in steps, at which a weight is rounded."""


@torch.no_grad()
def round_softly(model: PreparedModel) -> None:
    """Leaves weights within 0.05 steps of a rounding threshold as they are, from now on.

    Gupta and Asthana, 2311.05109, section 4.2: latent weights that oscillation holds at a threshold lie nearer to the
    optimum than either level. What this gains is what oscillations cost; engines, which hold integers, cannot have it.

    Args:
        model: A trained one; values beyond its grids still become the grids' ends.
    """
    for conv in model.convs().values():
        if conv.quantizer is None:
            continue
        spec = conv.quantizer.spec
        levels = torch.clamp(conv.weight / conv.weight_scale(), spec.qmin, spec.qmax)
        conv.frozen = ((levels - levels.round()).abs() > REACH, fixed(levels))
