"""What a run tells about oscillations, for its report."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.qat.hooks import QatHooks

_BINS_PER_STEP = 16


@dataclass(frozen=True)
class Diagnostics:
    """Facts about the raw model at the end of training.

    Attributes:
        layers: For each layer bits, number of weights, and the shares that oscillate and that are frozen.
        traces: Scales and weights of the last iterations, raw and averaged, of the layers that oscillate most.
        histograms: For the same layers, how far latent weights lie from their level, in steps (-0.5 ... 0.5).
        norms: For each layer the divergence of batch normalisation's running statistics; empty where they were not
            estimated again.
    """

    layers: Mapping[str, Mapping[str, float]]
    traces: tuple[Mapping[str, Any], ...]
    histograms: Mapping[str, tuple[int, ...]]
    norms: Mapping[str, float]

    @classmethod
    def of(cls, model: PreparedModel, hooks: QatHooks) -> "Diagnostics":
        """Reads a model whose training has just ended."""
        traces = tuple(hooks.traces.to_json())
        convs = model.convs()
        histograms = {}
        for name in (trace["layer"] for trace in traces):
            ratio = (convs[name].weight / convs[name].weight_scale()).detach()
            counts = torch.histc(ratio - ratio.round(), _BINS_PER_STEP, -0.5, 0.5)
            histograms[name] = tuple(int(count) for count in counts)
        return cls(hooks.tracker.shares(), traces, histograms, {})

    def with_norms(self, norms: Mapping[str, float]) -> "Diagnostics":
        """The same with the divergences of batch normalisation."""
        return replace(self, norms=norms)

    @property
    def oscillating(self) -> float:
        """Share of oscillating weights among those of low-bit layers, or of all where there are none."""
        low = [layer for layer in self.layers.values() if layer["bits"] < 8] or list(self.layers.values())
        weights = sum(layer["weights"] for layer in low)
        return sum(layer["weights"] * layer["oscillating"] for layer in low) / max(weights, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "oscillating": self.oscillating,
            "layers": {name: dict(layer) for name, layer in self.layers.items()},
            "traces": [dict(trace) for trace in self.traces],
            "histograms": {name: list(counts) for name, counts in self.histograms.items()},
            "norms": dict(self.norms),
        }
