"""Two regressions small enough to watch that oscillate under quantization-aware training. Needs numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_BATCH = 128
# x uniform in +-sqrt(3) has E[x^2] = 1: a step then moves the latent weight by rate * (w* - q(w)) on average.
_UNIT_VARIANCE = 3**0.5


def ema(values: Array, decay: float) -> Array:
    """Average as `v' <- a v' + (1 - a) v` after each step (the EMA of Gupta and Asthana 2023).

    Args:
        values: float64 `[steps, ...]`; the average starts at the first row.
        decay: a.
    """
    averages = np.empty_like(values)
    average = values[0]
    for step, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        averages[step] = average
    return averages


# --- one weight, a fixed scale ------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedScale:
    """Traces of weights that learn one by one on a grid that does not move.

    Args:
        targets: w*, float64 `[runs]`.
        scale: s.
        latent: w after each step, float64 `[steps, runs]`.
        averaged: Its EMA, float64 `[steps, runs]`.
        start: Steps before this one belong to the way to the threshold, and are not measured.
    """

    targets: Array
    scale: float
    latent: Array
    averaged: Array
    start: int

    @property
    def quantized(self) -> Array:
        """q(w) after each step, float64 `[steps, runs]`."""
        return _nearest(self.latent, self.scale)

    @property
    def averaged_quantized(self) -> Array:
        """What an evaluation of the EMA would use: the averaged latent weight, then quantized."""
        return _nearest(self.averaged, self.scale)

    def frequency(self) -> Array:
        """Count oscillations a step, float64 `[runs]`: from one level to the other and back is one."""
        levels = np.round(self.latent[self.start :] / self.scale)
        return np.asarray((np.diff(levels, axis=0) != 0).sum(0) / 2 / len(levels))

    def squared_error(self, quantized: Array) -> Array:
        """E[(x w* - x q)^2] for E[x^2] = 1, the mean over the measured steps, float64 `[runs]`."""
        return np.asarray(((quantized[self.start :] - self.targets) ** 2).mean(0))


def _nearest(values: Array, scale: float) -> Array:
    return np.asarray(np.round(values / scale) * scale)


def predict_frequency(targets: Array, scale: float) -> Array:
    """Return |w* - q(w*)| / s, in oscillations a step (Nagel et al. 2022, the toy regression).

    On the lower level the latent weight climbs by `rate * d` with d = w* - q, on the upper one it falls by
    `rate * (s - d)`. It stays near the threshold, so climbs and falls cancel, and the upper level is held for d / s
    of the time; the rate cancels too. The farther level is left after one step, so that share is also the frequency.
    """
    return np.abs(targets - _nearest(targets, scale)) / scale


def run_fixed_scale(
    targets: Sequence[float], rates: Sequence[float], scale: float, *, steps: int, start: int, decay: float, seed: int
) -> FixedScale:
    """Minimize E[(x w* - x q(w))^2 / 2] by SGD (Nagel et al. 2022, the toy regression).

    Straight through, the gradient to w is `E[x^2] (q(w) - w*)`; here it comes from a batch, the same for all runs.

    Args:
        targets: w* of each run.
        rates: Learning rate of each run.
        scale: s.
        steps: Steps to take, all of them recorded.
        start: First step to measure.
        decay: a of the EMA.
        seed: Of the batches.
    """
    wanted, rate = np.asarray(targets, float), np.asarray(rates, float)
    inputs = np.random.default_rng(seed).uniform(-_UNIT_VARIANCE, _UNIT_VARIANCE, (steps, _BATCH))
    weight, latent = wanted.copy(), np.empty((steps, len(wanted)))
    for step, power in enumerate((inputs**2).mean(1)):
        weight = weight - rate * power * (_nearest(weight, scale) - wanted)
        latent[step] = weight
    return FixedScale(wanted, scale, latent, ema(latent, decay), start)


# --- several weights and their inputs, learned scales -------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Ends of an integer grid."""

    qmin: int
    qmax: int

    def apply(self, values: Array, scale: float) -> tuple[Array, Array, Array]:
        """Quantize with what LSQ needs for the way back (Esser et al. 2020, eq. 1 to 3 and 5).

        Returns:
            `q = s clip(round(v / s), qmin, qmax)`, `dq/dv` (1 inside, 0 clipped) and
            `dq/ds` (`round(v / s) - v / s` inside, the clipped end otherwise), each of the shape of `values`.
        """
        ratio = values / scale
        integers = np.clip(np.round(ratio), self.qmin, self.qmax)
        inside = (ratio >= self.qmin) & (ratio <= self.qmax)
        return integers * scale, inside.astype(float), np.where(inside, integers - ratio, integers)


@dataclass(frozen=True)
class Regression:
    """y = x . w* for x uniform in [0, 1), fitted by the product of a quantized x and a quantized w.

    The weights share a scale as those of a tensor do. With a single weight the scale alone could fit any w*, and the
    oscillation would end there.

    Args:
        targets: w*, float64 `[n]`.
        weights: Grid of w.
        activations: Grid of x.
    """

    targets: Array
    weights: Grid
    activations: Grid

    def initial(self) -> Array:
        """Return w, s_w and s_a at the start, float64 `[n + 2]`.

        Weights are those of the float model, scales `2 mean|v| / sqrt(qmax)` (Esser et al. 2020, section 2.1); the
        mean of x is 1 / 2.
        """
        w_scale = 2 * np.abs(self.targets).mean() / self.weights.qmax**0.5
        return np.array([*self.targets, w_scale, 1 / self.activations.qmax**0.5])

    def predict(self, state: Array, inputs: Array) -> Array:
        """Return q(x) . q(w), float64 `[batch]`, for w, s_w and s_a in `state`."""
        return self.activations.apply(inputs, state[-1])[0] @ self.weights.apply(state[:-2], state[-2])[0]

    def squared_error(self, state: Array, inputs: Array) -> float:
        """Return E[(x . w* - q(x) . q(w))^2] over `inputs`, float64 `[batch, n]`."""
        return float(((self.predict(state, inputs) - inputs @ self.targets) ** 2).mean())

    def gradient(self, state: Array, inputs: Array) -> Array:
        """Differentiate half the squared error straight through, float64 `[n + 2]`.

        The gradients to the scales are multiplied by `1 / sqrt(n qmax)` (Esser et al. 2020, section 2.2).
        """
        w, w_to_value, w_to_scale = self.weights.apply(state[:-2], state[-2])
        x, _, x_to_scale = self.activations.apply(inputs, state[-1])
        error = x @ w - inputs @ self.targets
        to_w = error @ x / len(inputs)
        to_w_scale = to_w @ w_to_scale / (len(w) * self.weights.qmax) ** 0.5
        to_x_scale = (error @ (x_to_scale @ w)) / len(inputs) / (len(w) * self.activations.qmax) ** 0.5
        return np.array([*(to_w * w_to_value), to_w_scale, to_x_scale])


@dataclass(frozen=True)
class LearnedScales:
    """Traces of a `Regression`.

    Args:
        problem: What was fitted.
        raw: w, s_w and s_a after each step, float64 `[steps, n + 2]`.
        averaged: Their EMA, float64 `[steps, n + 2]`.
        raw_error: Squared errors after each of the last steps, float64 `[last]`.
        averaged_error: Those of the EMA, its weights quantized with its scales.
    """

    problem: Regression
    raw: Array
    averaged: Array
    raw_error: Array
    averaged_error: Array

    def quantized_weights(self, states: Array) -> Array:
        """Return q(w) of each state, float64 `[steps, n]`."""
        return np.array([self.problem.weights.apply(state[:-2], state[-2])[0] for state in states])

    def change_rates(self, states: Array) -> Array:
        """Return how often a step changes the integer of each weight, float64 `[n]`, over the last steps."""
        last = states[-len(self.raw_error) :]
        integers = np.round(self.quantized_weights(last) / last[:, -2:-1])
        return np.asarray((np.diff(integers, axis=0) != 0).mean(0))


def run_learned_scales(
    problem: Regression, *, rate: float, scale_rate: float, steps: int, last: int, decay: float, seed: int
) -> LearnedScales:
    """Fit weights and both scales by SGD, after the toy regression of Gupta and Asthana (2023); its settings are ours.

    Args:
        problem: What to fit.
        rate: Learning rate of the weights.
        scale_rate: Learning rate of the scales, before the factor of LSQ.
        steps: Steps to take, all of them recorded.
        last: Steps at the end whose errors are measured, on inputs that are the same for all.
        decay: a of the EMA, over weights and scales.
        seed: Of the batches and of the inputs that errors are measured on.
    """
    generator = np.random.default_rng(seed)
    count = len(problem.targets)
    state = problem.initial()
    rates = np.array([*(rate,) * count, scale_rate, scale_rate])
    raw = np.empty((steps, count + 2))
    for step in range(steps):
        state = state - rates * problem.gradient(state, generator.random((_BATCH, count)))
        raw[step] = state
    averaged = ema(raw, decay)
    held_out = generator.random((1024, count))
    errors = [[problem.squared_error(state, held_out) for state in states[-last:]] for states in (raw, averaged)]
    return LearnedScales(problem, raw, averaged, np.array(errors[0]), np.array(errors[1]))
