import time

import numpy as np
import pytest

from qyolo_deploy.validate import latency
from qyolo_deploy.validate.latency import measure_latency, measure_paired

IMAGES = np.zeros((1, 3, 32, 32), np.float32)


class Clock:
    """Time that passes only while a runner runs."""

    def __init__(self):
        self.now_ns = 0
        self.calls = []

    def perf_counter_ns(self):
        return self.now_ns

    def runner(self, name, *times_ms):
        remaining = list(times_ms)

        def run(images):
            assert images is IMAGES
            self.calls.append(name)
            self.now_ns += round(remaining.pop(0) * 1e6)

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_percentiles_leave_the_warmup_out(clock):
    result = measure_latency(clock.runner("a", 900, 800, *range(20, -1, -1)), IMAGES, warmup=2, runs=21)
    assert len(clock.calls) == 23
    assert (result.p50_ms, result.p95_ms, result.runs) == (10, 19, 21)
    assert result.p99_ms == pytest.approx(19.8)
    assert result.to_json() == pytest.approx({"p50": 10, "p95": 19, "p99": 19.8})


def test_paired_rounds_go_forth_and_back(clock):
    runners = {"float": clock.runner("float", *[1] * 4), "int8": clock.runner("int8", *[1] * 4)}
    measure_paired(runners, IMAGES, 3, baseline="float", warmup=1)
    assert clock.calls == ["float", "int8", "int8", "float"] * 2


def test_ratio_is_the_median_within_rounds(clock):
    # The machine slows down to a fifth in the second round: the ratio stays at a half.
    runners = {"int8": clock.runner("int8", 5, 25, 6), "float": clock.runner("float", 10, 50, 10)}
    paired = measure_paired(runners, IMAGES, 3, baseline="float", warmup=0)
    assert paired.baseline == "float"
    assert paired.ratios == {"int8": 0.5, "float": 1}
    assert paired.latencies["int8"].p50_ms == 6
    assert paired.latencies["float"].runs == 3


def test_real_clock_measures_milliseconds():
    result = measure_latency(lambda images: time.sleep(0.005), IMAGES, warmup=0, runs=3)
    assert 5 <= result.p50_ms < 1000


def test_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="'float'"):
        measure_paired({"int8": print}, IMAGES, rounds=1, baseline="float")


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="runs is 0"):
        measure_latency(print, IMAGES, warmup=0, runs=0)
    with pytest.raises(ValueError, match="rounds is 0"):
        measure_paired({"float": print}, IMAGES, rounds=0, baseline="float")
