"""What the report tells about oscillating weights, from the diagnostics of a training."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from qyolo_deploy.release.charts import Bar, Chart, Trace, bar_chart, histogram, trace_chart
from qyolo_deploy.release.report_text import fixed, to_number

_MOST_LAYERS = 20
_LOW_BITS = 8  # layers below it count as low-bit ones, as in the diagnostics


def oscillations(training: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compose the part on oscillations, or return None where no training took place or none of it was recorded.

    Args:
        training: The section of `report.json`: `epochs`, `diagnostics`.
    """
    diagnostics = training.get("diagnostics") or {}
    if not diagnostics or not training.get("epochs"):
        return None
    layers = diagnostics.get("layers") or {}
    traced = [(trace, charts) for trace in diagnostics.get("traces") or [] if (charts := _trace_charts(trace))]
    bars = [_share_chart(layers), _norm_chart(diagnostics.get("norms") or {})]
    return {
        "sentence": _sentence(to_number(diagnostics.get("oscillating")), layers),
        "bars": [chart for chart in bars if chart],
        "traced": _traced_sentence(len(traced)),
        "has_threshold": any(_threshold(trace) is not None for trace, _ in traced),
        "layers": [(str(trace.get("layer")), charts) for trace, charts in traced],
        "histograms": [
            _histogram(name, counts) for name, counts in (diagnostics.get("histograms") or {}).items() if any(counts)
        ],
    }


def _share(layer: Mapping[str, Any], key: str) -> float:
    return to_number(layer.get(key)) or 0.0


def _sentence(share: float | None, layers: Mapping[str, Mapping[str, Any]]) -> str:
    if share is None or not layers:
        return "The training recorded nothing about oscillations: no layer has quantized weights."
    low = [layer for layer in layers.values() if _share(layer, "bits") < _LOW_BITS]
    among = low or list(layers.values())
    frozen = sum(_share(layer, "weights") * _share(layer, "frozen") for layer in among)
    frozen /= sum(_share(layer, "weights") for layer in among) or 1.0
    whose = f"of layers with fewer than {_LOW_BITS} bits " if low else ""
    also = f"; {_percent(frozen)} % are frozen" if frozen else ""
    return (
        f"At the end of training {_percent(share)} % of the weights {whose}oscillate: "
        f"they keep changing back and forth between two levels{also}."
    )


def _traced_sentence(count: int) -> str:
    which = "layer" if count == 1 else f"{count} layers"
    return (
        f"The end of training in the {which} that oscillated most when this recording began: scales, and the latent "
        "weight that oscillated most often, raw and averaged (EMA). The averages are what is quantized for the engines."
    )


def _percent(share: float) -> str:
    return fixed(share * 100, 2)


def _caption(text: str, shown: int, total: int) -> str:
    return text if shown == total else f"{text}: the {shown} greatest of {total} layers"


def _share_chart(layers: Mapping[str, Mapping[str, Any]]) -> Chart | None:
    """Draw the oscillating share of each layer, and tell the frozen one where there are frozen weights."""
    keys = ("oscillating", "frozen")
    has_frozen = any(_share(layer, "frozen") for layer in layers.values())
    if not has_frozen and not any(_share(layer, "oscillating") for layer in layers.values()):
        return None
    ranked = sorted(layers.items(), key=lambda item: [_share(item[1], key) for key in keys], reverse=True)
    bars = []
    for name, layer in ranked[:_MOST_LAYERS]:
        share, frozen = (_share(layer, key) for key in keys)
        text = f"{_percent(share)}, {_percent(frozen)} frozen" if frozen else _percent(share)
        bars.append(Bar(f"{name} ({layer.get('bits')})", "c-raw", share * 100, text))
    what = "Oscillating and frozen weights" if has_frozen else "Oscillating weights"
    caption = _caption(f"{what}, % of each layer's (its bits in brackets)", len(bars), len(layers))
    return caption, bar_chart(bars, title=caption)


def _norm_chart(norms: Mapping[str, Any]) -> Chart | None:
    """Draw how far the running statistics of each layer's EMA state were from those estimated again."""
    known = [(name, value) for name, found in norms.items() if (value := to_number(found)) is not None]
    if not known:
        return None
    known.sort(key=lambda item: item[1], reverse=True)
    # Rounding can take a divergence of nothing below zero.
    bars = [Bar(name, "c-ema", max(value, 0.0), f"{value:.3g}") for name, value in known[:_MOST_LAYERS]]
    text = "KL divergence of batch normalisation's running statistics from those estimated again"
    caption = _caption(text, len(bars), len(known))
    return caption, bar_chart(bars, title=caption)


def _points(trace: Mapping[str, Any], state: str, key: str) -> list[tuple[float, float]]:
    """Return iteration and number of one quantity, `state` being raw or ema."""
    values = (trace.get(state) or {}).get(key) or []
    return [(float(step), y) for step, value in enumerate(values, 1) if (y := to_number(value)) is not None]


def _trace_charts(trace: Mapping[str, Any]) -> list[Chart]:
    """Draw scales and weight of one layer, raw and averaged (figures 1 and 2 of Gupta and Asthana, 2311.05109)."""
    drawn = [
        ("weight_scale", "Scale of the weights"),
        ("input_scale", "Scale of the inputs"),
        ("weight", f"Latent weight {trace.get('weight_index')}, in steps"),
    ]
    charts = [(caption, _trace_chart(trace, key, caption)) for key, caption in drawn]
    return [(caption, svg) for caption, svg in charts if svg]


def _trace_chart(trace: Mapping[str, Any], key: str, caption: str) -> str | None:
    lines: Sequence[tuple[str, str]] = (("c-raw", "raw"), ("c-ema", "ema"))
    traces = [Trace(style, points, label=state) for style, state in lines if (points := _points(trace, state, key))]
    if not traces:
        return None
    steps = max(line.points[-1][0] for line in traces)
    if key == "weight" and (level := _threshold(trace)) is not None:
        traces.insert(0, Trace("c-level", [(1.0, level), (steps, level)], "dashed"))
    return trace_chart(
        traces, title=f"{trace.get('layer')}: {caption}, raw and EMA", x_label=f"last {steps:.0f} iterations"
    )


def _threshold(trace: Mapping[str, Any]) -> float | None:
    """Return the rounding threshold that the raw weight crosses most often, or None where it crosses none."""
    values = [y for _, y in _points(trace, "raw", "weight")]
    crossed = [
        max(round(before), round(after)) - 0.5
        for before, after in pairwise(values)
        if abs(round(before) - round(after)) == 1
    ]
    return max(sorted(set(crossed)), key=crossed.count) if crossed else None


def _histogram(name: str, counts: Sequence[float]) -> Chart:
    title = f"{name}: distance of latent weights to their level"
    svg = histogram(counts, -0.5, 0.5, title=title, x_label="steps", style="c-raw", unit="weights")
    return f"{name}, weights", svg
