"""Builds at 4 and 3 bits through the command line: engines hold what was trained, and the report says how."""

import json

import onnx
import pytest
import torch
from helpers.chromium import Chromium, find_chromium

GATES = '[{view: onnxruntime, metric: map50_95, op: ">=", bound: -0.001, relative_to: fake_quantized}]'
EVERYTHING = (
    "quantization.weights.bits=3",
    "quantization.activations.bits=4",
    "train.dampening={weight: 0.001}",
    "train.freezing={first: 0.02}",
    "train.backbone_first=0.3",
    "train.reestimate_norm=2",
    "train.loss={labels: 0.5, logits: 1.0, detections: 0.0, features: 1.0}",
    "train.patience=3",
    "train.precision=bfloat16",
)


def build(tiny_build, qyolo, out, *settings):
    outcome = qyolo(*tiny_build.arguments(*settings), "--out", out, "--json")
    assert outcome.code == 0, outcome.stderr
    folder = out / "quickstart"
    return folder, json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def everything(tiny_build, qyolo, tmp_path_factory):
    """A build of 3-bit weights and 4-bit activations: its folder, and its report."""
    return build(tiny_build, qyolo, tmp_path_factory.mktemp("everything"), *EVERYTHING)


@pytest.fixture(scope="module")
def w4a4(tiny_build, qyolo, tmp_path_factory):
    """A build of 4-bit weights and activations whose report tells all that it can: its folder, and its report."""
    settings = (
        "quantization.activations.bits=4",
        "train.dampening={weight: 0.001}",
        "validate.sensitivity={images: 2}",
    )
    return build(tiny_build, qyolo, tmp_path_factory.mktemp("w4a4"), *settings)


@pytest.mark.slow
def test_every_method_together_trains_a_model_that_the_engines_hold(everything):
    folder, report = everything
    first, *_ = report["training"]["epochs"]
    assert {"labels", "logits", "features", "map50_95"} <= set(first)
    diagnostics = report["training"]["diagnostics"]
    assert 0 < diagnostics["oscillating"] < 1 and diagnostics["norms"]
    notes = " ".join(report["quantization"]["notes"])
    assert "onnxruntime: of the activations of fewer than 8 bits" in notes and "dB SQNR" in notes
    assert "Oscillations" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_what_the_engines_hold(tiny_build, qyolo, tmp_path):
    outcome = qyolo(*tiny_build.arguments(*EVERYTHING, f"gates={GATES}"), "--out", tmp_path, "--device", "cuda")
    assert outcome.code == 0, outcome.stderr


# --- the report in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(find_chromium(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


DECODED = "Promise.all([...document.images].map(image => image.decode().then(() => image.naturalWidth)))"
# How much lighter the background of the page is than its text, 0 to 255.
CONTRAST = """(() => {
  const light = colour => colour.match(/\\d+/g).slice(0, 3).map(Number).reduce((sum, part) => sum + part) / 3;
  const style = getComputedStyle(document.body);
  return light(style.backgroundColor) - light(style.color);
})()"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens_whole_in_a_browser(w4a4, chromium, width, scheme):
    folder, report = w4a4
    chromium.open(folder / "report.html", width, scheme)
    assert chromium.problems == []
    assert {url.split(":")[0] for url in chromium.requests} == {"file", "data"}
    assert chromium.evaluate("document.querySelector('.verdict').checkVisibility()")
    assert chromium.evaluate("document.querySelector('.verdict').getBoundingClientRect().bottom") < 900
    assert "gate" in chromium.evaluate("document.querySelector('.verdict strong').innerText")
    widths = chromium.evaluate(DECODED)
    # Each example in float and in both engines.
    assert len(widths) == 3 * len(report["images"]["examples"]) == 24 and min(widths) > 0
    assert (chromium.evaluate(CONTRAST) > 128) == (scheme == "light") and abs(chromium.evaluate(CONTRAST)) > 128
    chromium.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert chromium.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.slow
def test_numbers_of_the_page_are_those_of_the_report(w4a4, chromium):
    folder, report = w4a4
    chromium.open(folder / "report.html", 1280)
    cells = "row => [...row.cells].map(cell => cell.textContent.trim())"
    table = chromium.evaluate(f"[...document.querySelectorAll('#views table')[0].rows].map({cells})")
    for view, row in zip(report["views"], table[1:], strict=True):
        texts = dict(zip(table[0], row, strict=True))
        for title, key in (("mAP50-95", "map50_95"), ("mAP50", "map50"), ("mAP75", "map75")):
            assert texts[title] == f"{view[key] * 100:.2f}"
        if view["size_bytes"]:
            assert texts["Size, MB"] == f"{view['size_bytes'] / 1e6:.2f}"
            assert texts["p50, ms"] == f"{view['latency_ms']['p50']:.2f}"
    tables = chromium.evaluate(f"[...document.querySelectorAll('#layers table')].map(t => [...t.rows].map({cells}))")
    (layers,) = [table for table in tables if table[0][:2] == ["Layer", "Weight bits"]]
    for layer, row in zip(report["quantization"]["layers"], layers[1:], strict=True):
        expected = [layer[key] for key in ("weight_bits", "activation_bits", "weights", "input_zero_point")]
        assert [int(row[place].replace("−", "-")) for place in (1, 2, 3, 6)] == expected
        assert float(row[5]) == float(f"{layer['input_scale']:.4g}")
        assert row[4].startswith(f"{layer['weight_scale']['median']:.4g}")
    boxes = chromium.evaluate(
        "[...document.querySelectorAll('.boxes rect')].map(box => ['x', 'y', 'width', 'height'].map("
        "side => Number(box.getAttribute(side))))"
    )
    drawn = [box["box"] for e in report["images"]["examples"] for view in e["views"].values() for box in view["boxes"]]
    assert boxes == drawn and len(boxes) > 24
    text = chromium.evaluate("document.body.textContent")
    assert all(digest in text for digest in report["reproduce"]["digests"].values())


CURVES = """(() => {
  const shown = [...document.querySelectorAll('.pick .pr')].filter(part => getComputedStyle(part).display !== 'none');
  return [...new Set(shown.map(part => [...part.classList].at(-1)))].concat(shown[0].textContent.split(',')[0]);
})()"""


@pytest.mark.slow
def test_curves_of_a_class_are_chosen_by_the_keyboard_and_print_shows_the_mean(w4a4, chromium):
    folder, report = w4a4
    classes = next(iter(report["precision_recall"]["views"].values()))["per_class"]
    chromium.open(folder / "report.html", 390)
    assert chromium.evaluate("document.querySelectorAll('.picker input').length") == 1 + len(classes)
    assert chromium.evaluate(CURVES) == ["pr0", "All classes"]
    chromium.evaluate("document.querySelector('.picker input').focus()")
    chromium.press("ArrowDown")
    group, name = chromium.evaluate(CURVES)
    assert group == "pr1" and name in classes
    assert chromium.evaluate("document.activeElement.id") == "pr-1"
    chromium.print_media()
    assert chromium.evaluate(CURVES) == ["pr0", "All classes"]
    assert not chromium.evaluate("document.querySelector('.picker').checkVisibility()")
    assert chromium.evaluate(
        "document.querySelector('#curves .small').checkVisibility()"
    )  # each class beside the others


@pytest.mark.slow
def test_the_report_tells_what_quantizing_each_tensor_costs(w4a4, chromium, qyolo):
    folder, report = w4a4
    parts = report["sensitivity"]["parts"]
    chromium.open(folder / "report.html", 1280)
    cells = "row => [...row.cells].map(cell => cell.textContent.trim())"
    tables = chromium.evaluate(f"[...document.querySelectorAll('#layers table')].map(t => [...t.rows].map({cells}))")
    (table,) = [table for table in tables if table[0][:3] == ["Tensor", "Kind", "Bits"]]
    expected = [[part["name"], part["kind"], str(part["bits"]), f"{part['sqnr_db']:.1f}"] for part in parts]
    assert [[*row[:3], row[3].replace("−", "-")] for row in table[1:]] == expected
    # The command finds all of it measured, and ranks the same.
    kept = (folder / "sensitivity" / "measured.json").read_bytes()
    outcome = qyolo("sensitivity", folder, "--data", folder / "data", "--images", 2, "--json")
    assert outcome.code == 0, outcome.stderr
    assert [part["name"] for part in outcome.json["parts"]] == [part["name"] for part in parts]
    assert (folder / "sensitivity" / "measured.json").read_bytes() == kept


@pytest.mark.slow
def test_the_report_is_small(w4a4):
    folder, report = w4a4
    assert (folder / "report.html").stat().st_size < 3e6
    assert "webp" not in (folder / "report.json").read_text(encoding="utf-8")
    losses = [example["views"] for example in report["images"]["examples"]]
    drops = [v["float"]["score"] - min(v["onnxruntime"]["score"], v["openvino"]["score"]) for v in losses]
    assert drops == sorted(drops, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "operator"), [("hardswish", "HardSwish"), ("relu", "Relu")])
def test_a_swapped_activation_is_in_the_engine_and_not_in_the_float_baseline(
    activation, operator, tiny_build, qyolo, tmp_path
):
    folder, _ = build(tiny_build, qyolo, tmp_path, f"model.activation={activation}", "quantization.activations.bits=4")
    engines = folder / "engines" / "onnxruntime"
    kinds = {
        path.stem: {node.op_type for node in onnx.load(path).graph.node} for path in sorted(engines.glob("*.onnx"))
    }
    quantized, baseline = kinds["quickstart_w4a4"], kinds["quickstart_fp32"]
    # A ReLU whose clipping the codes' own Clip does is gone from the graph.
    assert operator in quantized or (activation == "relu" and "Clip" in quantized)
    assert operator not in baseline and "Sigmoid" in baseline
