import base64
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import chain
from xml.etree import ElementTree

import pytest
from helpers.svg import axis, lines, shapes

from qyolo_deploy.errors import InputError, RuntimeMissingError
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
                {"name": "model.0.conv", "weight_bits": 8, "activation_bits": 8},
                {
                    "name": "model.1.conv",
                    "weight_bits": 4,
                    "activation_bits": 4,
                    "weights": 4608,
                    "weight_scale": {"min": 0.0125, "median": 0.025, "max": 0.05},
                    "input_scale": 0.603454,
                    "input_zero_point": -3,
                },
            ],
            "notes": ["4 bit in an int8 kernel"],
        },
        "environment": {"python": "3.11.7"},
        "lineage": [{"stage": "train", "key": "12" * 32, "inputs": {"data": "34" * 32}}],
        "precision_recall": {
            "iou": 0.5,
            "recall": [0.0, 0.5, 1.0],
            "views": {
                view: {"mean": [1.0, low, 0.0], "per_class": {"cat": [1.0, low, 0.0], "dog": [1.0, 0.9, 0.0]}}
                for view, low in (("float", 0.8), ("fake_quantized", 0.7), ("onnxruntime", 0.6))
            },
        },
        "images": make_images(),
        "calibration": {"name": "spread", "images": 2, "seed": 7, "files": ["a.jpg", "b.jpg"], "webp_base64": PICTURE},
        "reproduce": {
            "commands": [{"what": "Build", "command": "qyolo build recipe.resolved.yaml"}],
            "digests": {"recipe": "cd" * 32},
        },
    }


PICTURE = base64.b64encode(b"picture").decode()


def make_images():
    found = {"kind": "right", "name": "cat", "box": [10, 20, 30, 40], "score": 0.875}
    missed = {"kind": "missed", "name": "cat", "box": [10, 20, 30, 40]}
    totals = {"right": 31, "wrong": 7, "missed": 11, "images_worse": 5, "images_better": 2}
    example = {
        "title": "image 1.jpg",
        "width": 100,
        "height": 80,
        "webp_base64": PICTURE,
        "views": {
            "float": {"score": 1.0, "right": 1, "wrong": 0, "missed": 0, "boxes": [found]},
            "onnxruntime": {"score": 0.25, "right": 0, "wrong": 3, "missed": 1, "boxes": [missed]},
        },
    }
    return {"conf": 0.25, "iou": 0.5, "views": {"float": totals, "onnxruntime": totals}, "examples": [example]}


def render(tmp_path, report):
    write_report(tmp_path / "report.html", report)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_all_sections_and_their_numbers(tmp_path):
    page = Page(render(tmp_path, make_report()))
    expected = ["gates", "views", "curves", "classes", "images", "layers", "training", "correction", "calibration"]
    assert page.sections == [*expected, "environment", "reproduce"]
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
        "mAP50-95 of ONNX Runtime − Float ≥ −0.50: it is −0.23",  # what the verdict says of the gate that failed
        "8 / 8 in 1 layers, 4 / 4 in 1 layers",
        "0.025 (0.0125 to 0.05)",  # the median of the channels' scales and its ends
        "−3",
        "ONNX Runtime 0.25 (−0.75) · 0 of 1 found, 3 false",
        "a confidence of 0.25, matched at IoU 0.5",
        "a.jpg",
        "qyolo build recipe.resolved.yaml",
        "cd" * 32,
    ):
        assert text in page.text


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    text = render(tmp_path, make_report())
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base", "form"}
    sources = [attrs[key] for _, attrs in page.elements for key in ("src", "href", "srcset") if key in attrs]
    assert sources and all(source.startswith(("data:image/webp;base64,", "#")) for source in sources)
    assert not re.search(r"https?://|@import|url\(", text)


def test_links_within_the_page_lead_somewhere(tmp_path):
    page = Page(render(tmp_path, make_report()))
    targets = {attrs["href"].lstrip("#") for tag, attrs in page.elements if tag == "a"}
    assert targets == set(page.sections)


def hostile(value):
    if isinstance(value, dict):
        return {
            key: hostile(inner) for key, inner in [*value.items(), *((HOSTILE, v) for v in list(value.values())[:1])]
        }
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
    assert page.sections == ["views", "reproduce"]
    assert "gate" not in page.text.lower()


def test_numbers_that_were_not_measured_are_dashes(tmp_path):
    view = make_view("float", math.nan, map50=None, map75=None, size_bytes=None, latency_ms=None, per_class=None)
    page = Page(render(tmp_path, {"name": "x", "views": [view], "training": {"epochs": [{"epoch": 1, "loss": None}]}}))
    assert page.sections == ["views", "reproduce"]
    assert "nan" not in page.text.lower()


def test_what_others_measure_is_shown_where_it_is_there(tmp_path):
    report = make_report()
    equal = {"name": "model.0.conv", "sqnr_db": 200.0, "cosine": 1.0, "max_error": 0.0, "differing": None}
    layers = [
        equal,
        {"name": "model.1.conv", "sqnr_db": 41.26, "cosine": 0.99995, "max_error": 0.125, "differing": 0.01},
    ]
    report["parity"] = {"onnxruntime": {"images": 6, "first_departure": "model.1.conv", "layers": layers}}
    report["sensitivity"] = make_sensitivity("map")
    report["views"][2]["interval"] = {"difference": -0.0023, "low": -0.0061, "high": 0.0012, "confidence": 0.9}
    report["views"].append({"name": "tensorrt", "state": "built, not run"})
    page = Page(render(tmp_path, report))
    for text in (
        "the first layer that departs is model.1.conv",
        "SQNR ONNX Runtime, dB",
        "SQNR of each layer, dB (200: equal)",
        "model.0.conv equal 1.000000 0 –",
        "41.3",
        "0.999950",
        "on the grids that training starts from; 8 validation images, on which the float model has mAP50-95 31.12.",
        "model.1.conv W4, 3.75",  # what a bar tells
        "model.1.conv weights 4 18.2 3.75",  # a row of the table of all tensors
        "Weights alone: mAP50-95 lost, points",
        "Input alone: mAP50-95 lost, points",
        "90% interval of Δ",
        "−0.61 to +0.12",
        "TensorRT (built, not run)",
    ):
        assert text in page.text


def make_sensitivity(metric):
    weights = {"name": "model.1.conv", "kind": "weights", "bits": 4, "layers": ["model.1.conv"]}
    inputs = {"name": "model.0.act", "kind": "activations", "bits": 8, "layers": ["model.1.conv"]}
    lost = (None, None) if metric == "sqnr" else (0.0375, -0.001)
    parts = [{**weights, "sqnr_db": 18.2, "lost": lost[0]}, {**inputs, "sqnr_db": 31.0, "lost": lost[1]}]
    return {"metric": metric, "images": 8, "baseline": None if metric == "sqnr" else 0.3112, "parts": parts}


def test_costs_by_sqnr_are_noise_as_a_share_of_the_signal(tmp_path):
    report = {**make_report(), "sensitivity": make_sensitivity("sqnr")}
    text = render(tmp_path, report)
    page = Page(text)
    for told in ("8 validation images.", "model.1.conv W4, 18.2 dB", "model.0.act activations 8 31.0"):
        assert told in page.text
    cells = re.findall(r"<td>([^<]*)</td>", text[text.index(">model.1.conv</th>") :])
    assert cells[6:8] == ["18.2", "31.0"]  # the last columns of the table of layers
    svg = next(ElementTree.fromstring(s) for s in re.findall(r"<svg.*?</svg>", text) if "Cost of quantizing" in s)
    value_of = axis(svg, "middle", "x")
    ends = [max(value_of(x) for x, _ in shapes(svg, style)[0]) for style in ("c-weights", "c-activations")]
    assert ends == pytest.approx([1000 * 10**-1.82, 1000 * 10**-3.1], abs=0.1)


def test_curves_of_all_classes_are_there_to_choose_from(tmp_path):
    report = make_report()
    report["views"][2]["per_class"] = {"cat": 0.2889, "dog": 0.4089}
    text = render(tmp_path, report)
    page = Page(text)
    radios = [attrs for tag, attrs in page.elements if tag == "input"]
    assert [(radio["id"], "checked" in radio) for radio in radios] == [("pr-0", True), ("pr-1", False), ("pr-2", False)]
    assert "All classes cat −2.2 dog −0.2" in page.text  # the worst view's, from 31.12 and 41.12
    assert "All classes, mAP50-95: Float 31.1, ONNX Runtime 30.9" in page.text
    assert "dog, AP50-95: Float 41.1, ONNX Runtime 40.9" in page.text
    assert {f".pick:has(#pr-{i}:checked) .pr{i}" for i in range(3)} == set(re.findall(r"\.pick:has\(#\S+ \.pr\d", text))
    drawn = lines(
        next(ElementTree.fromstring(s) for s in re.findall(r"<svg.*?</svg>", text) if ">Precision over recall<" in s)
    )
    assert [*chain(*drawn["v-float pr pr0"])] == pytest.approx([0, 1, 0.5, 0.8, 1, 0], abs=0.01)
    assert [*chain(*drawn["v-onnxruntime pr pr1"])] == pytest.approx([0, 1, 0.5, 0.6, 1, 0], abs=0.01)
    assert [*chain(*drawn["v-onnxruntime pr pr2"])] == pytest.approx([0, 1, 0.5, 0.9, 1, 0], abs=0.01)


def test_a_single_class_leaves_nothing_to_choose(tmp_path):
    report = make_report()
    for view in report["precision_recall"]["views"].values():
        del view["per_class"]["dog"]
    page = Page(render(tmp_path, report))
    assert "curves" in page.sections and not [tag for tag, _ in page.elements if tag in ("input", "fieldset")]


def test_boxes_lie_where_their_numbers_are_and_tell_what_they_are(tmp_path):
    page = Page(render(tmp_path, make_report()))
    boxes = [attrs for tag, attrs in page.elements if tag == "rect"]
    assert [[float(box[key]) for key in ("x", "y", "width", "height")] for box in boxes] == [[10, 20, 30, 40]] * 2
    kinds = [attrs["class"] for tag, attrs in page.elements if tag == "g" and attrs.get("class") in ("right", "missed")]
    assert kinds == ["right", "missed"]
    assert "cat, right, confidence 0.88" in page.text and "cat, missed" in page.text
    frames = [attrs["viewbox"] for tag, attrs in page.elements if tag == "svg" and attrs.get("class") == "boxes"]
    assert frames == ["0 0 100 80"] * 2


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


def test_without_matplotlib_the_way_out_is_named(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.ticker", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeMissingError, match="matplotlib") as caught:
        write_report(tmp_path / "report.html", make_report())
    assert "build" in caught.value.hint
    assert not (tmp_path / "report.html").exists()


def test_importing_the_report_imports_neither_jinja2_nor_matplotlib():
    code = "import sys, qyolo_deploy.release.report; print(bool({'jinja2', 'matplotlib'} & set(sys.modules)))"
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
