import base64
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qyolo_deploy.errors import InputError, RuntimeMissingError
from qyolo_deploy.release.plots import Bar, Dot, bar_chart, dot_plot, line_chart, nice_ticks
from qyolo_deploy.release.report import write_report
from qyolo_deploy.release.report_text import fixed, gate_number, points

HOSTILE = "<script>alert('x')</script>\" onload=\"x"
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Collects the elements and the text of a page, and checks that elements nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def sections(self):
        return [attrs["id"] for tag, attrs in self.elements if tag == "section"]


def make_view(name, map50_95, **changes):
    view = {
        "name": name,
        "map50_95": map50_95,
        "map50": map50_95 + 0.2,
        "map75": map50_95 + 0.02,
        "map_small": -1.0,
        "images": 206,
        "thresholds": {"conf": 0.001, "iou": 0.6, "max_det": 300},
        "imgsz": 640,
        "letterbox": "rect",
        "precision_hint": None,
        "size_bytes": 7_540_000,
        "latency_ms": {"p50": 20.0, "p95": 25.0},
        "digests": {"engine": "ab" * 32},
        "per_class": {"cat": map50_95, "dog": map50_95 + 0.1, "none": None},
    }
    return {**view, **changes}


def make_report():
    gate = {
        "view": "onnxruntime",
        "metric": "map50_95",
        "op": ">=",
        "bound": -0.005,
        "relative_to": "float",
        "mode": "difference",
        "observed": 0.3089,
        "reference": 0.3112,
        "value": -0.0023,
        "passed": True,
        "reason": "held",
    }
    return {
        "name": "tiny_w4a8",
        "version": "1.2.3",
        "recipe": {"path": "recipes/tiny.yaml", "yaml": "name: tiny_w4a8\nmodel: x\n"},
        "views": [
            make_view("float", 0.3112),
            make_view("fake_quantized", 0.3091, size_bytes=None, latency_ms=None),
            make_view("onnxruntime", 0.3089, size_bytes=1_885_000, latency_ms={"p50": 16.0, "p95": 18.0}),
        ],
        "gates": [gate, {**gate, "passed": False, "reason": "it did not hold"}],
        "training": {
            "epochs": [{"epoch": e, "loss": 3.0 / e, "lr": 0.001, "seconds": 2.5, "map50_95": 0.1} for e in (1, 2, 3)],
            "images_per_s": 14.25,
        },
        "correction": {"steps": [{"step": s, "loss": 1.0 / (s + 1)} for s in range(50)]},
        "quantization": {
            "scheme": "W4A8",
            "targets": ["onnxruntime", "openvino"],
            "layers": [
                {"name": "model.0.conv", "weight_bits": 8},
                {"name": "model.1.conv", "weight_bits": 4},
            ],
            "notes": ["4 bit in an int8 kernel"],
        },
        "environment": {"python": "3.11.7"},
        "lineage": [{"stage": "train", "key": "12" * 32, "inputs": {"data": "34" * 32}}],
        "samples": [{"title": "image 1", "jpeg_base64": base64.b64encode(b"jpeg").decode()}],
    }


def render(tmp_path, report):
    write_report(tmp_path / "report.html", report)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_all_sections_and_their_numbers(tmp_path):
    page = Page(render(tmp_path, make_report()))
    expected = ["views", "gates", "classes", "training", "correction", "quantization", "samples", "origin"]
    assert page.sections == expected
    for text in (
        "31.12",  # mAP50-95 of float in points
        "−0.23 to float",
        "25% of float",  # size 1.885 of 7.54 MB
        "1.25× the speed of float",  # 20 ms against 16 ms
        "1 of 2 gates failed",
        "mAP50-95 of ONNX Runtime − Float ≥ −0.50",
        "it did not hold",
        "images per s",
        "14.25",
        "model.1.conv",
        "onnxruntime, openvino",
        "4 bit in an int8 kernel",
        "name: tiny_w4a8 model: x",
        "conf 0.001, iou 0.6, max_det 300",
    ):
        assert text in page.text


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    text = render(tmp_path, make_report())
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base", "form"}
    sources = [attrs[key] for _, attrs in page.elements for key in ("src", "href", "srcset") if key in attrs]
    assert sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert not re.search(r"https?://|@import|url\(", text)


def test_links_within_the_page_lead_somewhere(tmp_path):
    page = Page(render(tmp_path, make_report()))
    targets = {attrs["href"].lstrip("#") for tag, attrs in page.elements if tag == "a"}
    assert targets == set(page.sections)


def hostile(value):
    if isinstance(value, dict):
        return {key: hostile(inner) for key, inner in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_text_stays_text(tmp_path):
    report = hostile(make_report())
    report["views"][0]["per_class"] = {HOSTILE: 0.5}
    page = Page(render(tmp_path, report))
    assert not [tag for tag, attrs in page.elements if tag == "script" or "onload" in attrs]
    assert HOSTILE in page.text


def test_sections_without_data_are_left_out(tmp_path):
    assert Page(render(tmp_path, {"name": "empty"})).sections == []
    page = Page(render(tmp_path, {"name": "some", "views": [make_view("float", 0.5, per_class={})]}))
    assert page.sections == ["views", "origin"]
    assert "gate" not in page.text.lower()


def test_numbers_that_were_not_measured_are_dashes(tmp_path):
    view = make_view("float", math.nan, map50=None, map75=None, size_bytes=None, latency_ms=None, per_class=None)
    page = Page(render(tmp_path, {"name": "x", "views": [view], "training": {"epochs": [{"epoch": 1, "loss": None}]}}))
    assert page.sections == ["views", "origin"]
    assert "nan" not in page.text.lower()


def test_the_same_report_gives_the_same_bytes(tmp_path):
    assert render(tmp_path, make_report()) == render(tmp_path, make_report())


def test_an_unwritable_place_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path / "file" / "report.html", make_report())


def test_without_jinja2_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RuntimeMissingError, match="jinja2") as caught:
        write_report(tmp_path / "report.html", make_report())
    assert "build" in caught.value.hint
    assert not (tmp_path / "report.html").exists()


def test_importing_the_report_does_not_import_jinja2():
    code = "import sys, qyolo_deploy.release.report; print('jinja2' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.3112, False, "31.12"),
        (-0.0023, True, "−0.23"),
        (-0.00001, True, "+0.00"),
        (-1, False, "–"),
        (None, True, "–"),
    ],
)
def test_points(value, signed, text):
    assert points(value, signed=signed) == text


def test_fixed_has_a_true_minus_and_no_negative_zero():
    assert (fixed(-1.25, 1), fixed(-0.001, 2), fixed(None, 2)) == ("−1.2", "0.00", "–")


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        ({"metric": "map50_95", "bound": 0.3}, "30.00"),
        ({"metric": "per_class.cat", "bound": 0.3}, "30.00"),
        ({"metric": "map50", "bound": -0.005, "relative_to": "float", "mode": "difference"}, "−0.50"),
        ({"metric": "latency_ms.p50", "bound": 0.6, "relative_to": "float", "mode": "ratio"}, "0.600×"),
        ({"metric": "latency_ms.p95", "bound": 30}, "30.00 ms"),
        ({"metric": "size_bytes", "bound": 1_500_000}, "1.50 MB"),
        ({"metric": "images", "bound": 206}, "206"),
        ({"metric": "map50_95", "bound": None}, "–"),
    ],
)
def test_gate_numbers_have_the_unit_of_their_metric(gate, text):
    assert gate_number(gate, "bound") == text


@given(low=st.floats(-1e5, 1e5), span=st.floats(0, 1e5) | st.just(0.0))
def test_ticks_cover_the_range_evenly_with_round_steps(low, span):
    high = low + span
    if 0 < high - low < 1e-6 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high)
    steps = [after - before for before, after in pairwise(ticks)]
    assert ticks[0] <= low + steps[0] * 1e-6 and ticks[-1] >= high - steps[0] * 1e-6
    assert 2 <= len(ticks) <= 9
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-3
    assert max(steps) - min(steps) < steps[0] * 1e-3


def test_bars_start_at_zero_and_are_in_proportion():
    svg = ElementTree.fromstring(
        bar_chart([Bar("a", "v-float", 30.0, "30", 60.0), Bar("b", "v-other", 15.0, "15")], title="t")
    )
    widths = [float(rect.get("width")) for rect in svg.iter("rect")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.11)
    assert widths[1] == pytest.approx(2 * widths[2], abs=0.11)
    assert len({rect.get("x") for rect in svg.iter("rect")}) == 1


def test_a_line_goes_through_its_points():
    values = [(0.0, 1.0), (5.0, 2.0), (10.0, 4.0)]
    svg = ElementTree.fromstring(line_chart(values, title="loss", x_label="epoch", style="c-loss"))
    placed = [tuple(map(float, pair.split(","))) for pair in svg.find(".//polyline").get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = placed
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y2 == pytest.approx(3 * (y0 - y1), abs=0.2)  # SVG counts downwards
    assert len(list(svg.iter("circle"))) == 3
    _, _, width, height = map(float, svg.get("viewBox").split())
    assert all(0 <= x <= width and 0 <= y <= height for x, y in placed)


@pytest.mark.parametrize(
    "values", [[(3.0, 0.5)], [(1.0, 2.0), (2.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)], [(0, 1e9), (9, 1e-9)]]
)
def test_lines_of_one_point_or_one_value_can_be_drawn(values):
    svg = line_chart(values, title="t", x_label="step", style="c-loss")
    assert "nan" not in svg and "inf" not in svg
    assert ElementTree.fromstring(svg).find(".//polyline") is not None


def test_dots_lie_where_their_values_are():
    rows = [("a<b", [Dot("x", "v-float", -1.0), Dot("y", "v-other", 1.0)]), ("c", [Dot("x", "v-float", 0.0)])]
    svg = ElementTree.fromstring(dot_plot(rows, title="t"))
    left, right, middle = (float(circle.get("cx")) for circle in svg.iter("circle"))
    assert middle == pytest.approx((left + right) / 2, abs=0.11)
    assert "a<b" in [text.text for text in svg.iter("text")]


def test_plots_escape_what_they_are_given():
    texts = (
        bar_chart([Bar(HOSTILE, "v-other", 1.0, HOSTILE)], title=HOSTILE),
        dot_plot([(HOSTILE, [Dot(HOSTILE, "v-other", 1.0)])], title=HOSTILE),
        line_chart([(0, 1)], title=HOSTILE, x_label=HOSTILE, style="c-loss"),
    )
    for text in texts:
        root = ElementTree.fromstring(text)
        assert not list(root.iter("script")) and root.get("aria-label") == HOSTILE
