"""The settings under which `toy` shows oscillation, and what is measured there."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qyolo_deploy.qat.toy import (
    Array,
    FixedScale,
    Grid,
    LearnedScales,
    Regression,
    predict_frequency,
    run_fixed_scale,
    run_learned_scales,
)

SCALE = 0.2
TARGETS = (0.21, 0.42, 0.36, 0.26, -0.32)  # 0.05, 0.1, 0.2, 0.3 and 0.4 of a level from the nearest one
RATES = (0.1, 0.01)
FIXED_STEPS, FIXED_START = 24_000, 8_000  # the slowest run takes about 900 steps to its threshold
FIXED_DECAY = 0.999

WEIGHTS = (0.9, -0.55, 0.3, 0.15)
WEIGHT_BITS, ACTIVATION_BITS = 3, 4
LEARNED_RATE = 0.1
LEARNED_STEPS, LAST = 5_000, 1_000
LEARNED_DECAY = 0.998


@dataclass(frozen=True)
class OscillationDemo:
    """Both simulations.

    Args:
        seed: Of their inputs.
        fixed: A run for each rate and target: all targets of the first rate come first.
        learned: Weights with learned scales.
    """

    seed: int
    fixed: FixedScale
    learned: LearnedScales

    def to_json(self) -> dict[str, Any]:
        """What was measured, as plain data."""
        return {"seed": self.seed, "fixed_scale": self._fixed(), "learned_scales": self._learned()}

    def _fixed(self) -> dict[str, Any]:
        fixed = self.fixed
        columns = {
            "predicted_frequency": predict_frequency(fixed.targets, SCALE),
            "measured_frequency": fixed.frequency(),
            "raw_squared_error": fixed.squared_error(fixed.quantized),
            "ema_squared_error": fixed.squared_error(fixed.averaged_quantized),
        }
        runs = [
            {
                "target": target,
                "learning_rate": RATES[index // len(TARGETS)],
                **{name: float(values[index]) for name, values in columns.items()},
            }
            for index, target in enumerate(fixed.targets.tolist())
        ]
        return {"scale": SCALE, "steps": FIXED_STEPS - FIXED_START, "ema_decay": FIXED_DECAY, "runs": runs}

    def _learned(self) -> dict[str, Any]:
        learned = self.learned
        settings = {"learning_rate": LEARNED_RATE, "steps": LEARNED_STEPS, "last": LAST, "ema_decay": LEARNED_DECAY}
        raw = self._summary(learned.raw, learned.raw_error)
        return {**settings, "raw": raw, "ema": self._summary(learned.averaged, learned.averaged_error)}

    def _summary(self, states: Array, errors: Array) -> dict[str, float]:
        weight_scale, activation_scale = states[-LAST:, -2:].T
        return {
            "squared_error_mean": float(errors.mean()),
            "squared_error_std": float(errors.std()),
            "weight_scale_std": float(weight_scale.std()),
            "activation_scale_std": float(activation_scale.std()),
            "changes_per_step": float(self.learned.change_rates(states).sum()),
        }


def simulate_oscillation(seed: int) -> OscillationDemo:
    """Run both regressions; the same seed gives the same numbers."""
    fixed = run_fixed_scale(
        TARGETS * len(RATES),
        np.repeat(RATES, len(TARGETS)).tolist(),
        SCALE,
        steps=FIXED_STEPS,
        start=FIXED_START,
        decay=FIXED_DECAY,
        seed=seed,
    )
    half = 1 << (WEIGHT_BITS - 1)
    problem = Regression(np.array(WEIGHTS), Grid(-half, half - 1), Grid(0, (1 << ACTIVATION_BITS) - 1))
    learned = run_learned_scales(
        problem,
        rate=LEARNED_RATE,
        scale_rate=LEARNED_RATE,
        steps=LEARNED_STEPS,
        last=LAST,
        decay=LEARNED_DECAY,
        seed=seed,
    )
    return OscillationDemo(seed, fixed, learned)
