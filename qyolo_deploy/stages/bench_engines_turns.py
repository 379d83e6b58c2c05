"""Engines that take turns: inference times by round, and ratios within the same round."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from qyolo_deploy.engines.base import Runner, open_engine
from qyolo_deploy.stages.bench_engines_subjects import BenchEnginesSettings, Subject

_LOADS = 3


def take_turns(
    runs_of: Sequence[Callable[[], object]],
    rounds: int,
    runs: int,
    progress: Callable[[int, int, int], None] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
    settle: bool = True,
) -> list[list[list[float]]]:
    """Times calls round by round; every second round goes backwards, so that none always follows the same one.

    A round before the first warms up. Where calls are short, each turn begins with one that does not count: it wakes
    threads, fills caches and outlasts the threads of the one before, which keep looking for work for a moment.

    Args:
        runs_of: One inference of each engine.
        rounds: That count.
        runs: Calls that count, in each turn.
        progress: Called with turns done, turns in total and who had the last one.
        clock: Nanoseconds.
        settle: Whether turns begin with a call that does not count.

    Returns:
        Milliseconds of each call, by engine and round.
    """
    times: list[list[list[float]]] = [[] for _ in runs_of]
    count = len(runs_of)
    for index in range(1 + rounds):
        order = range(count) if index % 2 else range(count - 1, -1, -1)
        for place, which in enumerate(order):
            turn = _turn(runs_of[which], runs, clock, settle)
            if index:
                times[which].append(turn)
            if progress is not None:
                progress(index * count + place + 1, (1 + rounds) * count, which)
    return times


def _turn(run: Callable[[], object], runs: int, clock: Callable[[], int], settle: bool) -> list[float]:
    if settle:
        run()
    elapsed = []
    for _ in range(runs):
        start = clock()
        run()
        elapsed.append((clock() - start) / 1e6)
    return elapsed


def summarize(times: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What a row tells of its times.

    Args:
        times: Milliseconds by round.
        baseline: Those of the engine to compare with, of the same rounds.

    Returns:
        `round_ms` (the median of each round), `p50_ms`, `p95_ms` and `p99_ms` of all calls, and `ratio`: median and
        extremes of the round's median divided by the baseline's of that round, so that below 1 is faster.
    """
    own, other = ([statistics.median(turn) for turn in rounds] for rounds in (times, baseline))
    ratios = [mine / theirs for mine, theirs in zip(own, other, strict=True)]
    p50, p95, p99 = np.percentile(list(chain.from_iterable(times)), (50, 95, 99))
    return {
        "round_ms": own,
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def load(subject: Subject, settings: BenchEnginesSettings) -> tuple[Runner, list[float]]:
    """Opens an engine several times; the first, which reads it from the disk and may start its runtime, is not timed.

    Args:
        subject: A row with an engine.
        settings: Threads and mode.

    Raises:
        QyoloError: It cannot be opened.
    """
    assert subject.path is not None
    arguments = (subject.path, subject.hint or "f32", settings.conf, settings.threads, settings.mode)
    runner = open_engine(*arguments)
    elapsed = []
    for _ in range(_LOADS):
        start = time.perf_counter_ns()
        runner = open_engine(*arguments)
        elapsed.append((time.perf_counter_ns() - start) / 1e6)
    return runner, elapsed
