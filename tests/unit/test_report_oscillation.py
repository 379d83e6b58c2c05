import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from helpers.svg import axis, lines, number, shapes

from qyolo_deploy.release.report import write_report
from qyolo_deploy.stages.report_parts import read_diagnostics

HOSTILE = "<script>alert('x')</script>\" onload=\"x"
RAW = {
    "weight_scale": [0.031, 0.033, 0.032],
    "input_scale": [1.25, 1.5, 1.0],
    "weight": [-1.6, -1.45, -1.55],
}
EMA = {
    "weight_scale": [0.0315, 0.032, 0.0321],
    "input_scale": [1.2, 1.3, 1.25],
    "weight": [-1.52, -1.51, -1.53],
}
COUNTS = [40, 3, 0, 1, 2, 0, 0, 5, 6, 0, 0, 2, 1, 0, 4, 38]


def make_diagnostics(name="model.1.conv", frozen=0.0):
    layer = {"bits": 4, "weights": 300, "oscillating": 0.02, "frozen": frozen}
    return {
        "oscillating": 0.0175,
        "layers": {
            "model.0.conv": {"bits": 8, "weights": 900, "oscillating": 0.1, "frozen": 0.0},
            name: layer,
            "model.2.conv": {"bits": 4, "weights": 100, "oscillating": 0.01, "frozen": 0.0},
        },
        "traces": [{"layer": name, "weight_index": 71, "raw": RAW, "ema": EMA}],
        "histograms": {name: COUNTS},
        "norms": {"model.0.conv": 0.5, name: 0.25},
    }


def render(tmp_path, diagnostics, epochs=({"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0})):
    training = {"epochs": list(epochs), "diagnostics": diagnostics}
    write_report(tmp_path / "report.html", {"name": "x", "training": training})
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def drawn(page):
    """The page's pictures by what is read out in their place."""
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return {picture.get("aria-label"): picture for picture in pictures}


def picture(page, *words):
    (found,) = [svg for label, svg in drawn(page).items() if all(word in label for word in words)]
    return found


def rows(svg):
    """Label, length of the bar and text of each row of a bar chart."""
    texts = [text for text in svg.iter("text") if text.get("fill") == "var(--ink)"]
    labels = [text.text for text in texts if text.get("text-anchor") == "end"]
    values = [text.text for text in texts if text.get("text-anchor") == "start"]
    bars = [bar for style in ("c-raw", "c-ema") for bar in shapes(svg, style)]
    lengths = [max(x for x, _ in bar) - min(x for x, _ in bar) for bar in bars]
    return list(zip(labels, lengths, values, strict=True))


def test_the_share_is_told_in_a_sentence(tmp_path):
    page = render(tmp_path, make_diagnostics())
    assert "At the end of training 1.75 % of the weights of layers with fewer than 8 bits oscillate" in page
    assert "frozen" not in page
    page = render(tmp_path, make_diagnostics(frozen=0.04))
    assert "; 3.00 % are frozen" in page  # 0.04 of 300 weights, none of 100


def test_without_low_bit_layers_the_share_is_that_of_all(tmp_path):
    diagnostics = make_diagnostics()
    for layer in diagnostics["layers"].values():
        layer["bits"] = 8
    assert "1.75 % of the weights oscillate" in render(tmp_path, diagnostics)


def test_bars_tell_the_share_of_each_layer_in_falling_order(tmp_path):
    found = rows(picture(render(tmp_path, make_diagnostics()), "Oscillating weights"))
    assert [(label, text) for label, _, text in found] == [
        ("model.0.conv (8)", "10.00"),
        ("model.1.conv (4)", "2.00"),
        ("model.2.conv (4)", "1.00"),
    ]
    longest, middle, shortest = (length for _, length, _ in found)
    assert longest == pytest.approx(5 * middle, abs=0.3) and middle == pytest.approx(2 * shortest, abs=0.2)


def test_bars_tell_what_is_frozen(tmp_path):
    found = rows(picture(render(tmp_path, make_diagnostics(frozen=0.04)), "Oscillating and frozen weights"))
    assert [text for _, _, text in found] == ["10.00", "2.00, 4.00 frozen", "1.00"]


def test_of_many_layers_the_twenty_that_oscillate_most_are_drawn(tmp_path):
    layer = {"bits": 4, "weights": 10, "frozen": 0.0}
    layers = {f"layer.{n}": {**layer, "oscillating": n / 100} for n in range(30)}
    norms = {f"layer.{n}": n / 10 for n in range(30)}
    page = render(tmp_path, {**make_diagnostics(), "layers": layers, "norms": norms})
    expected = [f"layer.{n}" for n in range(29, 9, -1)]
    assert [label.removesuffix(" (4)") for label, _, _ in rows(picture(page, "Oscillating"))] == expected
    assert [label for label, _, _ in rows(picture(page, "KL divergence"))] == expected
    assert page.count("the 20 greatest of 30 layers</figcaption>") == 2


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("weight_scale", "Scale of the weights"),
        ("input_scale", "Scale of the inputs"),
        ("weight", "Latent weight 71, in steps"),
    ],
)
def test_traces_go_through_the_recorded_numbers(tmp_path, key, title):
    found = lines(picture(render(tmp_path, make_diagnostics()), "model.1.conv", title))
    for style, recorded in (("c-raw", RAW[key]), ("c-ema", EMA[key])):
        xs, ys = zip(*found[style], strict=True)
        assert xs == pytest.approx((1, 2, 3), abs=0.01)
        assert ys == pytest.approx(recorded, abs=(max(RAW[key]) - min(RAW[key])) * 2e-3)
    assert ("c-level" in found) == (key == "weight")


def test_the_threshold_lies_where_the_weight_changes_its_level(tmp_path):
    page = render(tmp_path, make_diagnostics())
    assert "rounding threshold (dashed)" in page
    level = lines(picture(page, "Latent weight"))["c-level"]
    assert [y for _, y in level] == pytest.approx([-1.5, -1.5], abs=1e-3)
    diagnostics = make_diagnostics()
    diagnostics["traces"][0]["raw"] = {**RAW, "weight": [0.1, 0.2, 0.1]}
    page = render(tmp_path, diagnostics)
    assert "rounding threshold" not in page and set(lines(picture(page, "Latent weight"))) == {"c-raw", "c-ema"}


def test_the_histogram_shows_every_bin(tmp_path):
    svg = picture(render(tmp_path, make_diagnostics()), "distance of latent weights")
    bars, places = shapes(svg, "c-raw"), axis(svg, "end", "y", 4.2)
    x_of, titles = axis(svg, "middle", "x"), [group.find("title").text for group in svg.iter("g")]
    assert [places(min(y for _, y in bar)) for bar in bars] == pytest.approx(COUNTS, abs=0.08)
    assert [max(y for _, y in bar) for bar in bars] == pytest.approx([182.0] * 16, abs=0.11)
    assert [x_of(min(x for x, _ in bar)) for bar in bars] == pytest.approx([n / 16 - 0.5 for n in range(16)], abs=3e-3)
    assert [number(title.split()[-2]) for title in titles] == COUNTS
    assert titles[0] == "−0.50 to −0.44: 40 weights"


def test_divergences_are_drawn_where_statistics_were_estimated_again(tmp_path):
    found = rows(picture(render(tmp_path, make_diagnostics()), "KL divergence"))
    assert [(label, text) for label, _, text in found] == [("model.0.conv", "0.5"), ("model.1.conv", "0.25")]
    assert found[0][1] == pytest.approx(2 * found[1][1], abs=0.2)
    assert "KL divergence" not in render(tmp_path, {**make_diagnostics(), "norms": {}})


@pytest.mark.parametrize("diagnostics", [{}, None])
def test_without_diagnostics_the_part_is_left_out(tmp_path, diagnostics):
    page = render(tmp_path, diagnostics)
    assert "scillation" not in page and 'id="training"' in page


def test_without_epochs_the_part_is_left_out(tmp_path):
    page = render(tmp_path, make_diagnostics(), epochs=())
    assert "scillation" not in page and 'id="training"' not in page


def test_empty_lists_are_told_in_a_sentence(tmp_path):
    empty = {"oscillating": 0.0, "layers": {}, "traces": [], "histograms": {}, "norms": {}}
    page = render(tmp_path, empty)
    assert "recorded nothing about oscillations" in page
    assert list(drawn(page)) == ["Loss by epoch"]
    still = {"model.0.conv": {"bits": 4, "weights": 9, "oscillating": 0.0, "frozen": 0.0}}
    page = render(tmp_path, {**empty, "layers": still})
    assert " 0.00 % of the weights" in page and list(drawn(page)) == ["Loss by epoch"]


def test_traces_without_iterations_are_left_out(tmp_path):
    nothing = {key: [] for key in RAW}
    trace = {"layer": "model.1.conv", "weight_index": 0, "raw": nothing, "ema": nothing}
    page = render(tmp_path, {**make_diagnostics(), "traces": [trace], "histograms": {"model.1.conv": [0] * 16}})
    assert "EMA" not in page and "Latent" not in page and "model.1.conv: " not in page


def test_what_is_no_number_is_not_drawn(tmp_path):
    diagnostics = make_diagnostics()
    diagnostics["traces"][0]["raw"] = {**RAW, "input_scale": [1.25, None, math.nan]}
    diagnostics["norms"] = {"model.0.conv": None, "model.1.conv": math.inf, "model.2.conv": -1e-9}
    page = render(tmp_path, diagnostics)
    assert len(lines(picture(page, "Scale of the inputs"))["c-raw"]) == 1
    assert [label for label, _, _ in rows(picture(page, "KL divergence"))] == ["model.2.conv"]
    assert not re.search(r"\b(nan|inf)\b", page)


def test_layer_names_stay_text(tmp_path):
    page = render(tmp_path, make_diagnostics(HOSTILE))
    assert "<script" not in page and "&lt;script&gt;" in page
    pictures = drawn(page)  # every picture is well-formed
    assert [label for label in pictures if label.startswith(f"{HOSTILE}: ")]
    assert not [element for svg in pictures.values() for element in svg.iter() if element.get("onload")]


def test_the_part_needs_nothing_from_elsewhere(tmp_path):
    page = render(tmp_path, make_diagnostics())
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)


def test_the_report_carries_the_diagnostics_with_short_numbers(tmp_path):
    diagnostics = make_diagnostics()
    diagnostics["traces"][0]["raw"] = {"weight": [0.123456789, -1.5]}
    diagnostics["norms"] = {"model.0.conv": math.inf}
    assert read_diagnostics(tmp_path) == {}
    (tmp_path / "diagnostics.json").write_text(json.dumps(diagnostics))
    found = read_diagnostics(tmp_path)
    assert found["traces"][0]["raw"]["weight"] == [0.123457, -1.5]
    assert found["norms"] == {"model.0.conv": None}
    assert (found["layers"], found["histograms"]) == (diagnostics["layers"], diagnostics["histograms"])
