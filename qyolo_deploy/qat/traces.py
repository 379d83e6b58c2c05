"""Scales and weights of the last iterations, raw and averaged: the figures 1 and 2 of Gupta and Asthana, 2311.05109."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.qat.oscillation import OscillationTracker

LENGTH = 300
LAYERS = 4
_SETTLED = 1 / 3
_FINE_BITS = 8  # so fine a grid oscillates most and matters least


class Traces:
    """Records the end of a run for the layers that oscillate most when the recording begins.

    Args:
        model: What learns.
        tracker: Its counts choose layers and weights.
        steps: Optimizer steps of the whole run; the last 300 are recorded, but none of the first third, after which
            the counts tell which layers oscillate.
    """

    def __init__(self, model: PreparedModel, tracker: OscillationTracker, steps: int) -> None:
        self._model, self._tracker = model, tracker
        self._start = max(_SETTLED, 1 - LENGTH / max(steps, 1))
        self._layers: list[str] = []
        self._weights: list[int] = []
        self._rows: list[Tensor] = []

    def record(self, progress: float, ema: Mapping[str, Tensor]) -> None:
        """Adds a row `[layers, 6]`: weight scale, input scale and latent weight in steps, each raw and averaged."""
        if progress < self._start or not self._tracker.layers:
            return
        if not self._layers:
            self._choose()
        state = dict(self._model.named_parameters())
        rows = [
            [*self._values(name, index, state), *self._values(name, index, ema)]
            for name, index in zip(self._layers, self._weights, strict=True)
        ]
        self._rows.append(torch.tensor(rows))

    def _choose(self) -> None:
        """The layers with most oscillating weights, and in each the weight that flips most often."""
        shares = self._tracker.shares()
        low = [name for name in shares if shares[name]["bits"] < _FINE_BITS] or list(shares)
        ranked = sorted(low, key=lambda name: -shares[name]["oscillating"])
        self._layers = ranked[:LAYERS]
        parts = {layer.name: slice(layer.start, layer.end) for layer in self._tracker.layers}
        self._weights = [int(self._tracker.frequency[parts[name]].argmax()) for name in self._layers]

    def _values(self, name: str, index: int, state: Mapping[str, Tensor]) -> list[float]:
        weight, scale = state[f"graph.{name}.weight"], state[f"graph.{name}.quantizer.scale"]
        group = self._model.placement.groups[self._model.placement.inputs[name]]
        channel = index // weight[0].numel() if scale.ndim else 0
        step = scale.flatten()[channel].item()
        return [step, state[f"graph.quantizers.{group}.scale"].item(), weight.flatten()[index].item() / step]

    def tensors(self) -> dict[str, Tensor]:
        """State for the checkpoint."""
        if not self._rows:
            return {}
        names = "\n".join(self._layers).encode()
        return {
            "trace_rows": torch.stack(self._rows),
            "trace_weights": torch.tensor(self._weights),
            "trace_layers": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        if "trace_rows" in tensors:
            self._rows = list(tensors["trace_rows"])
            self._weights = [int(index) for index in tensors["trace_weights"]]
            self._layers = bytes(tensors["trace_layers"].tolist()).decode().split("\n")

    def to_json(self) -> list[dict[str, Any]]:
        """One entry a layer, with lists over iterations."""
        keys = ("weight_scale", "input_scale", "weight")
        rows = torch.stack(self._rows) if self._rows else torch.zeros(0, len(self._layers), 2 * len(keys))
        return [
            {
                "layer": name,
                "weight_index": index,
                "raw": {key: rows[:, at, column].tolist() for column, key in enumerate(keys)},
                "ema": {key: rows[:, at, column + len(keys)].tolist() for column, key in enumerate(keys)},
            }
            for at, (name, index) in enumerate(zip(self._layers, self._weights, strict=True))
        ]
