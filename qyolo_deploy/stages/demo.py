"""`qyolo demo`: small simulations of what training does, and the pages that show them. Needs no torch."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qyolo_deploy.qat import toy_demo
from qyolo_deploy.qat.toy import Array, FixedScale, LearnedScales
from qyolo_deploy.release.demo_page import html_table, write_demo_page
from qyolo_deploy.release.traces import Trace, trace_chart

_SHOWN = 3  # target whose traces are drawn: it changes in three steps of ten, seldom enough to see and often enough
_FIXED_WINDOW, _LEARNED_WINDOW = 60, 300  # steps in a chart

Table = tuple[list[str], list[list[str]]]


def run_oscillation(path_html: str | os.PathLike[str], seed: int = 0) -> dict[str, Any]:
    """Simulate why weights and scales oscillate, and write the page that shows it.

    Args:
        path_html: The file to write.
        seed: Of the inputs; the same seed gives the same numbers.

    Returns:
        What was measured, as plain data.

    Raises:
        InputError: The file cannot be written.
    """
    demo = toy_demo.simulate_oscillation(seed)
    numbers = demo.to_json()
    parts = {**_settings(seed), **_fixed_charts(demo.fixed), **_learned_charts(demo.learned)}
    parts["frequency"] = _frequency_chart(numbers["fixed_scale"]["runs"])
    parts["fixed_table"] = html_table(*frequency_table(numbers))
    parts["learned_table"] = html_table(*error_table(numbers))
    write_demo_page(path_html, "oscillation", parts)
    return numbers


def frequency_table(numbers: Mapping[str, Any]) -> Table:
    """Head and rows for the fixed grid: frequencies by learning rate, and errors at the first rate."""
    runs = numbers["fixed_scale"]["runs"]
    head = ["fixed scale: w*", "predicted frequency", *(f"at rate {rate:g}" for rate in toy_demo.RATES)]
    rows = []
    for index, target in enumerate(toy_demo.TARGETS):
        same = runs[index :: len(toy_demo.TARGETS)]
        frequencies = [same[0]["predicted_frequency"], *(run["measured_frequency"] for run in same)]
        errors = [same[0]["raw_squared_error"], same[0]["ema_squared_error"]]
        rows.append([f"{target:g}".replace("-", "−"), *(f"{x:.4f}" for x in frequencies), *map(_error, errors)])
    return [*head, "raw squared error", "EMA squared error"], rows


def error_table(numbers: Mapping[str, Any]) -> Table:
    """Head and rows for learned scales: raw weights and scales beside their EMA."""
    head = ["learned scales", "squared error", "scale of weights", "scale of inputs", "changes a step"]
    rows = []
    for key, title in (("raw", "raw"), ("ema", "EMA")):
        found = numbers["learned_scales"][key]
        error = f"{_error(found['squared_error_mean'])} ± {_error(found['squared_error_std'])}"
        spreads = (f"± {found[name]:.5f}" for name in ("weight_scale_std", "activation_scale_std"))
        rows.append([title, error, *spreads, f"{found['changes_per_step']:.2f}"])
    return head, rows


def _error(value: float) -> str:
    return f"{value:.5f}"


def _settings(seed: int) -> dict[str, str]:
    rates = {f"rate_{index}": f"{rate:g}" for index, rate in enumerate(toy_demo.RATES)}
    return rates | {
        "seed": str(seed),
        "scale": f"{toy_demo.SCALE:g}",
        "shown_target": f"{toy_demo.TARGETS[_SHOWN]:g}",
        "measured_steps": f"{toy_demo.FIXED_STEPS - toy_demo.FIXED_START:,}",
        "fixed_decay": f"{toy_demo.FIXED_DECAY:g}",
        "learned_decay": f"{toy_demo.LEARNED_DECAY:g}",
        "count": str(len(toy_demo.WEIGHTS)),
        "weight_bits": str(toy_demo.WEIGHT_BITS),
        "activation_bits": str(toy_demo.ACTIVATION_BITS),
        "last": f"{toy_demo.LAST:,}",
    }


def _trace(style: str, values: Array, *, jumps: bool = False) -> Trace:
    """Trace values over their number."""
    return Trace(style, list(enumerate(values.tolist(), 1)), "steps" if jumps else "line")


def _level(value: float, window: int) -> Trace:
    return Trace("c-target", [(1, value), (window, value)], "dashed")


def _fixed_charts(fixed: FixedScale) -> dict[str, str]:
    last = slice(-_FIXED_WINDOW, None)
    charts = {}
    for index, rate in enumerate(toy_demo.RATES):
        run = index * len(toy_demo.TARGETS) + _SHOWN
        traces = [
            _level(toy_demo.TARGETS[_SHOWN], _FIXED_WINDOW),
            _trace("c-raw", fixed.quantized[last, run], jumps=True),
            _trace("c-ema", fixed.averaged_quantized[last, run], jumps=True),
            _trace("c-latent", fixed.latent[last, run]),
        ]
        title = f"Quantized, averaged and latent weight at rate {rate:g}"
        charts[f"trace_{index}"] = trace_chart(traces, title=title, x_label=f"last {_FIXED_WINDOW} steps")
    return charts


def _frequency_chart(runs: Sequence[Mapping[str, Any]]) -> str:
    top = 100 * max(run["predicted_frequency"] for run in runs)
    traces = [Trace("c-target", [(0.0, 0.0), (top, top)], "dashed")]
    looks: tuple[tuple[str, Literal["rings", "dots"]], ...] = (("c-raw", "rings"), ("c-ema", "dots"))
    for rate, (style, kind) in zip(toy_demo.RATES, looks, strict=True):
        same = [run for run in runs if run["learning_rate"] == rate]
        points = sorted((100 * run["predicted_frequency"], 100 * run["measured_frequency"]) for run in same)
        traces.append(Trace(style, points, kind))
    return trace_chart(traces, title="Measured over predicted oscillations per 100 steps", x_label="predicted")


def _learned_charts(learned: LearnedScales) -> dict[str, str]:
    restless = int(learned.change_rates(learned.raw).argmax())
    raw, averaged = learned.raw[-_LEARNED_WINDOW:], learned.averaged[-_LEARNED_WINDOW:]
    weights = [learned.quantized_weights(states)[:, restless] for states in (raw, averaged)]
    errors = [errors[-_LEARNED_WINDOW:] for errors in (learned.raw_error, learned.averaged_error)]
    drawn: dict[str, tuple[str, Array, Array]] = {
        "learned_weight": ("Quantized weight", weights[0], weights[1]),
        "weight_scale": ("Scale of the weights", raw[:, -2], averaged[:, -2]),
        "activation_scale": ("Scale of the inputs", raw[:, -1], averaged[:, -1]),
        "error": ("Squared error", errors[0], errors[1]),
    }
    charts = {"restless": str(restless + 1)}
    for name, (title, jumping, calm) in drawn.items():
        traces = [_trace("c-raw", jumping, jumps=name == "learned_weight"), _trace("c-ema", calm)]
        if name == "learned_weight":
            traces.insert(0, _level(toy_demo.WEIGHTS[restless], _LEARNED_WINDOW))
        charts[name] = trace_chart(traces, title=f"{title}, raw and EMA", x_label=f"last {_LEARNED_WINDOW} steps")
    return charts
