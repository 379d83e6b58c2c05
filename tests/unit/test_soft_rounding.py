import numpy as np
import pytest
import torch
from helpers.oscillation import make_model, set_latent

from qyolo_deploy.qat.soft_rounding import round_softly

LEVELS = np.array([2.44, 2.46, -1.5, -8.48, 7.48, 0.05, 100.47, -3.52, 126.9, -3.56])


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_weights_near_a_threshold_keep_their_latent_value(granularity):
    """At most 0.45 steps from a level they are rounded, and beyond the grid they become its ends."""
    model = make_model(granularity)
    set_latent(model, LEVELS)
    hard = {name: conv.quantized_weight() for name, conv in model.convs().items()}
    round_softly(model)
    found = np.concatenate(
        [(c.quantized_weight() / c.weight_scale()).flatten().detach().numpy() for c in model.convs().values()]
    )
    inside = np.clip(LEVELS, [-8] * 6 + [-128] * 4, [7] * 6 + [127] * 4)
    expected = np.where(np.abs(inside - np.rint(inside)) <= 0.45, np.rint(inside), inside)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert expected.tolist() == [2, 2.46, -1.5, -8, 7, 0, 100.47, -3.52, 127, -4]
    for name, conv in model.convs().items():
        kept = torch.from_numpy(expected != np.rint(expected))[:6] if name == "low" else torch.tensor([1, 1, 0, 0]) > 0
        assert torch.equal((conv.quantized_weight() != hard[name]).flatten(), kept)
