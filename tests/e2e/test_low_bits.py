"""Builds at 4 and 3 bits through the command line: engines hold what was trained, and the report says how."""

import json

import onnx
import pytest
import torch

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


def test_every_method_together_trains_a_model_that_the_engines_hold(tiny_build, qyolo, tmp_path):
    folder, report = build(tiny_build, qyolo, tmp_path, *EVERYTHING)
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
