"""Wall-clock latency of runners, alone and in pairs that share the machine's moods."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Runner = Callable[[npt.NDArray[np.float32]], Any]


@dataclass(frozen=True)
class Latency:
    """Latency of one runner: median, 95th and 99th percentile in milliseconds over a number of runs."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    runs: int

    def to_json(self) -> dict[str, float]:
        """Return the form in which reports hold it."""
        return {"p50": self.p50_ms, "p95": self.p95_ms, "p99": self.p99_ms}


@dataclass(frozen=True)
class PairedLatency:
    """Latencies of several runners measured in turn.

    Attributes:
        latencies: By runner.
        baseline: The runner that the others are compared with.
        ratios: By runner, the median over the rounds of its time divided by the baseline's time in the same
            round: below 1 is faster than the baseline, whose own ratio is 1.
    """

    latencies: dict[str, Latency]
    baseline: str
    ratios: dict[str, float]


def measure_latency(runner: Runner, images: npt.NDArray[np.float32], warmup: int, runs: int) -> Latency:
    """Time a runner.

    Args:
        runner: Called with `images`.
        images: float32 `[N, 3, H, W]`.
        warmup: Calls before the first that counts.
        runs: Calls that count, at least one.
    """
    _positive("runs", runs)
    for _ in range(warmup):
        runner(images)
    return _summary([_time_ms(runner, images) for _ in range(runs)])


def measure_paired(
    runners: Mapping[str, Runner],
    images: npt.NDArray[np.float32],
    rounds: int,
    *,
    baseline: str,
    warmup: int = 3,
) -> PairedLatency:
    """Time several runners in turn, each once a round.

    Clocks, caches and neighbours change from second to second; within a round they are nearly the same for
    all, so the ratios are steadier than those of separate measurements. Every second round goes backwards, so
    that none always follows the same one.

    Args:
        runners: By name.
        images: float32 `[N, 3, H, W]`.
        rounds: At least one.
        baseline: The name of the runner to compare with.
        warmup: Rounds before the first that counts.

    Raises:
        ValueError: `baseline` is none of the runners.
    """
    _positive("rounds", rounds)
    if baseline not in runners:
        raise ValueError(f"the baseline {baseline!r} is none of the runners {', '.join(runners)}")
    names = list(runners)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        for name in names if i % 2 == 0 else reversed(names):
            elapsed = _time_ms(runners[name], images)
            if i >= warmup:
                times[name].append(elapsed)
    reference = np.array(times[baseline])
    return PairedLatency(
        latencies={name: _summary(values) for name, values in times.items()},
        baseline=baseline,
        ratios={name: float(np.median(np.array(values) / reference)) for name, values in times.items()},
    )


def _time_ms(runner: Runner, images: npt.NDArray[np.float32]) -> float:
    start = time.perf_counter_ns()
    runner(images)
    return (time.perf_counter_ns() - start) / 1e6


def _summary(times_ms: Sequence[float]) -> Latency:
    p50, p95, p99 = np.percentile(times_ms, (50, 95, 99))
    return Latency(p50_ms=float(p50), p95_ms=float(p95), p99_ms=float(p99), runs=len(times_ms))


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
