import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from helpers.svg import axis, lines, shapes
from hypothesis import given
from hypothesis import strategies as st

from qyolo_deploy.release.charts import Bar, Dot, Trace, bar_chart, dot_plot, histogram, round_ticks, trace_chart
from qyolo_deploy.release.spot_chart import Spot, spot_chart
from qyolo_deploy.release.traces import nice_ticks

HOSTILE = "<script>alert('x')</script>\" onload=\"x $\\frac{$ \x00"


def drawn(svg):
    return ElementTree.fromstring(svg)


@pytest.mark.parametrize("make_ticks", [round_ticks, nice_ticks])
@given(low=st.floats(-1e5, 1e5), span=st.floats(0, 1e5) | st.just(0.0))
def test_ticks_cover_the_range_evenly_with_round_steps(make_ticks, low, span):
    high = low + span
    if 0 < high - low < 1e-6 * max(abs(low), abs(high)):
        return
    ticks = make_ticks(low, high)
    steps = [after - before for before, after in pairwise(ticks)]
    assert ticks[0] <= low + steps[0] * 1e-6 and ticks[-1] >= high - steps[0] * 1e-6
    assert 2 <= len(ticks) <= 9
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-3
    assert max(steps) - min(steps) < steps[0] * 1e-3


def test_bars_start_at_zero_and_are_in_proportion():
    svg = drawn(bar_chart([Bar("a", "v-float", 30.0, "30"), Bar("b", "v-other", 15.0, "15")], title="t"))
    (first,), (second,) = shapes(svg, "v-float"), shapes(svg, "v-other")
    left = [min(x for x, _ in bar) for bar in (first, second)]
    widths = [max(x for x, _ in bar) - start for bar, start in zip((first, second), left, strict=True)]
    assert left[0] == left[1] == pytest.approx(axis(svg, "middle", "x", inverse=True)(0.0), abs=0.11)
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.11)


def test_a_line_goes_through_its_points():
    values = [(0.0, 1.0), (5.0, 2.0), (10.0, 4.0)]
    svg = drawn(trace_chart([Trace("c-loss", values, "marks")], title="loss", x_label="epoch"))
    xs, ys = zip(*lines(svg)["c-loss"], strict=True)
    assert xs == pytest.approx([0, 5, 10], abs=0.02) and ys == pytest.approx([1, 2, 4], abs=0.02)
    _, *marks = svg.findall(".//g[@class='c-loss']/path")
    assert len(marks) == 3
    _, _, width, height = map(float, svg.get("viewBox").split())
    (line,) = shapes(svg, "c-loss")[:1]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in line)


@pytest.mark.parametrize(
    "values", [[(3.0, 0.5)], [(1.0, 2.0), (2.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)], [(0, 1e9), (9, 1e-9)]]
)
def test_lines_of_one_point_or_one_value_can_be_drawn(values):
    svg = trace_chart([Trace("c-loss", values)], title="t", x_label="step")
    assert not re.search(r"\b(nan|inf)\b", svg)
    assert shapes(drawn(svg), "c-loss")


@pytest.mark.parametrize("values", [[5e-06, 5.00001e-06], [0.5123451, 0.5123459], [2e6, 3e6], [7.0, 7.0]])
def test_ticks_tell_close_and_small_numbers_apart(values):
    svg = drawn(trace_chart([Trace("c-raw", list(enumerate(values)))], title="t", x_label="x"))
    ticks = [text for text in svg.iter("text") if text.get("text-anchor") == "end"]
    assert len({text.text for text in ticks}) == len(ticks) > 1
    assert all(float(text.get("x")) >= 6.0 * len(text.text) for text in ticks)  # none begins outside of the picture
    assert [y for _, y in lines(svg)["c-raw"]] == pytest.approx(values, rel=1e-3)


def test_epochs_have_no_halves():
    svg = drawn(trace_chart([Trace("c-loss", [(1, 0.5), (2, 0.25), (3, 0.2)])], title="t", x_label="epoch"))
    assert [text.text for text in svg.iter("text") if text.get("text-anchor") == "middle"] == ["1", "2", "3", "epoch"]


def test_dots_lie_where_their_values_are():
    rows = [("a<b", [Dot("x", "v-float", -1.0), Dot("y", "v-other", 1.0)]), ("c", [Dot("x", "v-float", 0.0)])]
    svg = drawn(dot_plot(rows, title="t"))
    found = [
        (dot.find("title").text, float(re.search(r"translate\(([\d.]+)", dot.find("path").get("transform"))[1]))
        for dot in svg.iter("g")
    ]
    (_, left), (_, right), (_, middle) = found
    assert middle == pytest.approx((left + right) / 2, abs=0.11) and left < right
    assert [text for text, _ in found] == ["a<b, x: −1.00", "a<b, y: 1.00", "c, x: 0.00"]
    assert "a<b" in [text.text for text in svg.iter("text")]


def test_names_in_a_plane_cover_neither_marks_nor_one_another():
    spots = [Spot("Float", "v-float", 20.0, 66.4), Spot("ONNX Runtime", "v-onnxruntime", 17.0, 65.48)]
    spots += [Spot("OpenVINO", "v-openvino", 18.0, 65.45), Spot("TensorRT", "v-tensorrt", 17.5, 65.5)]
    svg = drawn(spot_chart(spots, title="t", x_label="ms", y_label="mAP"))
    names = [text for text in svg.iter("text") if text.text in [spot.label for spot in spots]]
    boxes = []
    for text in names:
        x, y, width = float(text.get("x")), float(text.get("y")), 6.2 * len(text.text)
        boxes.append((x - width if text.get("text-anchor") == "end" else x, y - 9, width, 11))
    for path in svg.findall(".//g/path"):
        x, y = map(float, re.findall(r"[\d.]+", path.get("transform")))
        boxes.append((x - 5, y - 5, 10, 10))
    assert len(boxes) == 8
    for place, (x, y, width, height) in enumerate(boxes):
        for x2, y2, width2, height2 in boxes[place + 1 : 4 if place >= 4 else None]:
            assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y


def test_a_histogram_of_nothing_can_be_drawn():
    svg = drawn(histogram([0, 0], 0.0, 1.0, title=HOSTILE, x_label=HOSTILE, style="c-raw", unit=HOSTILE))
    assert [{y for _, y in bar} for bar in shapes(svg, "c-raw")] == [{182.0}] * 2


def test_charts_escape_what_they_are_given():
    shown = "".join(char for char in HOSTILE if char.isprintable())
    for text in (
        bar_chart([Bar(HOSTILE, "v-other", 1.0, HOSTILE)], title=HOSTILE),
        dot_plot([(HOSTILE, [Dot(HOSTILE, "v-other", 1.0)])], title=HOSTILE),
        trace_chart([Trace("c-loss", [(0, 1)], label=HOSTILE)], title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE),
        spot_chart([Spot(HOSTILE, "v-other", 1.0, 2.0)], title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE),
    ):
        root = drawn(text)
        assert not list(root.iter("script")) and root.get("aria-label") == shown
        assert not [element for element in root.iter() if element.get("onload")]


def test_colours_are_the_pages_own():
    svg = trace_chart([Trace("c-raw", [(0, 1), (1, 2)], "marks"), Trace("c-ema", [(0, 1)])], title="t", x_label="x")
    assert not re.search(r"#[0-9a-f]{3,6}|style=|url\(|https?:", svg)
    assert {"var(--c)", "var(--soft)", "var(--grid)", "var(--card)"} <= set(re.findall(r"var\(--\w+\)", svg))
