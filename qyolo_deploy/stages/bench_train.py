"""`qyolo bench train`: what a step of quantization-aware training costs beside one of float training.

Each kind of training lives in a process of its own, which tells its peak memory; the processes take turns, so that
within a round the machine is nearly the same for all.
"""

import contextlib
import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qyolo_deploy.console import Tick
from qyolo_deploy.errors import QyoloError
from qyolo_deploy.stages.bench_trainee import FLOAT, PEER, QAT, BenchSettings, Trainee, started


def run_bench(settings: BenchSettings, progress: Tick | None = None) -> dict[str, Any]:
    """Measures images a second and peak memory of training steps on random images and labels.

    Args:
        settings: What is measured.
        progress: Called after each turn.

    Returns:
        The settings, what was found about the machine, and a row for each training: `step_s` (seconds a step, by
        round), `images_per_s` (from their median), `ratio` (of its seconds to float training's in the same round:
        median and extremes) and memory of its process. Where the peer was not measured, `note` says why.

    Raises:
        QyoloError: The model is not usable, or a training failed.
    """
    with contextlib.ExitStack() as stack:
        trainees = [stack.enter_context(started(kind, settings)) for kind in (FLOAT, QAT)]
        note = _peer_refusal(trainees[0].facts["family"])
        if not note:
            try:
                trainees.append(stack.enter_context(started(PEER, settings)))
            except QyoloError as error:
                note = f"{error}. {error.hint or ''}".strip()
        for index in range(settings.rounds):
            for place, trainee in enumerate(trainees if index % 2 == 0 else reversed(trainees)):
                trainee.turn()
                if progress is not None:
                    progress(index * len(trainees) + place + 1, settings.rounds * len(trainees))
        for trainee in trainees:
            trainee.finish()
    rows = [_row(trainee, trainees[0].step_s, settings.batch) for trainee in trainees]
    if note:
        rows.append({"name": PEER, "note": note})
    machine = {key: trainees[0].facts[key] for key in ("torch", "threads")}
    return {**asdict(settings), **machine, "rows": rows}


def _peer_refusal(family: str) -> str:
    """Why there is nothing to compare with; empty where there is."""
    if family != "ultralytics":
        return "does not apply: ultralytics has no anchor-based YOLOv5"
    if importlib.util.find_spec("modelopt") is None:
        return 'needs nvidia-modelopt: pip install "qyolo_deploy[bench]"'
    return ""


def _row(trainee: Trainee, baseline_s: Sequence[float], batch: int) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(trainee.step_s, baseline_s, strict=True)]
    return {
        "name": trainee.kind,
        "step_s": trainee.step_s,
        "images_per_s": batch / statistics.median(trainee.step_s),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "memory_before_bytes": trainee.facts["memory_before_bytes"],
        "memory_peak_bytes": trainee.facts["memory_peak_bytes"],
        "note": "",
    }


def bench_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows for people."""
    head = ["training", "images/s", "s a step / float's", "min..max", "peak MB", "MB before step 1", "note"]
    label = f"{QAT} w{result['weight_bits']}a{result['activation_bits']}"
    rows = []
    for row in result["rows"]:
        name, cells = label if row["name"] == QAT else row["name"], ["-"] * 5
        if "step_s" in row:
            ratio = row["ratio"]
            memory = [f"{row[f'memory_{key}_bytes'] / 1e6:.0f}" for key in ("peak", "before")]
            spread = f"{ratio['min']:.2f}..{ratio['max']:.2f}"
            cells = [f"{row['images_per_s']:.2f}", f"{ratio['median']:.2f}", spread, *memory]
        rows.append([name, *cells, row["note"]])
    return head, rows
