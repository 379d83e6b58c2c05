"""Comparison of the integers with what a prepared model computes, layer by layer."""

import numpy as np
import torch


def assert_integers_compute_the_layers(model, quantized, view, images):
    """Given the inputs that the layers of `model` see, those of the integer `view` differ by rounding alone.

    Between the two lie the rounding to a code, and that of the bias to a step of the accumulator, which training does
    not know: half a step is `ratio / 2` codes.
    """
    seen = {}
    for name, conv in model.convs().items():
        conv.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    with torch.no_grad():
        model(images)
        for name, (x, output) in seen.items():
            target = quantized.activations[name]
            ends = (end - int(target.zero_point) for end in (target.spec.qmin, target.spec.qmax))
            codes = view.core.get_submodule(name)(x).double().numpy() / float(target.scale)
            exact = np.clip(output.double().numpy() / float(target.scale), *ends)
            ratio = quantized.bias_scale(name).astype(np.float64)[:, None, None] / float(target.scale)
            assert (np.abs(codes - exact) <= 0.5 + 0.5 * ratio + 1e-3).all(), name
    assert set(seen) == set(quantized.layers)
