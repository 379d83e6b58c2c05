import json

import pytest

from qyolo_deploy.errors import InputError
from qyolo_deploy.validate.coco_map import CocoMetrics
from qyolo_deploy.validate.report import EvalReport, MapInterval

METRICS = CocoMetrics(0.25, 0.5, 0.375, 0.0, None, 0.75, {"cat": 0.5, "dog": 0.0})


def report(**change):
    content = {
        "name": "onnxruntime",
        "metrics": METRICS,
        "images": 206,
        "thresholds": {"conf": 0.001, "iou": 0.6, "max_det": 300},
        "imgsz": 640,
        "letterbox": "rect",
        "precision_hint": "f32",
        "size_bytes": 2_000_000,
        "latency_ms": {"p50": 10.5, "p95": 12.0},
        "digests": {"engine": "ab" * 32},
    }
    return EvalReport(**{**content, **change})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"parity": {"min_sqnr_db": 41.5, "images": 2}},
        {"precision_hint": None, "size_bytes": None, "latency_ms": None, "digests": {}},
    ],
)
def test_report_survives_json(change):
    original = report(**change)
    assert EvalReport.from_json(json.loads(json.dumps(original.to_json()))) == original


def test_interval_survives_json():
    original = report(interval=MapInterval("float", -0.01, -0.02, 0.001, 0.95, 1000))
    assert EvalReport.from_json(json.loads(json.dumps(original.to_json()))) == original
    assert original.to_json()["interval"]["low"] == -0.02


def test_json_is_flat():
    content = report().to_json()
    assert list(content) == [
        *("name", "map50_95", "map50", "map75", "map_small", "map_medium", "map_large"),
        *(
            "images",
            "thresholds",
            "imgsz",
            "letterbox",
            "precision_hint",
            "size_bytes",
            "latency_ms",
            "digests",
            "parity",
            "interval",
        ),
        "per_class",
    ]
    assert content["map50_95"] == 0.25
    assert content["per_class"] == {"cat": 0.5, "dog": 0.0}


def test_report_refuses_nan():
    with pytest.raises(ValueError, match="p95 is nan"):
        report(latency_ms={"p50": 1.0, "p95": float("nan")})
    with pytest.raises(ValueError, match="conf is nan"):
        report(thresholds={"conf": float("nan")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"map50": "high"}, r"old\.json: map50: "),
        ({"map50": float("nan")}, r"old\.json: .*map50 is nan"),
        ({"latency_ms": {"p50": float("nan")}}, r"old\.json: .*p50 is nan"),
        ({"speed": 3}, r"old\.json: speed: "),
        ({"letterbox": "round"}, r"old\.json: letterbox: "),
    ],
)
def test_bad_json_is_refused_by_key(change, message):
    with pytest.raises(InputError, match=message):
        EvalReport.from_json({**report().to_json(), **change}, "old.json")


@pytest.mark.parametrize("key", ["images", "map75", "per_class"])
def test_missing_key_is_refused_by_name(key):
    content = report().to_json()
    del content[key]
    with pytest.raises(InputError, match=key):
        EvalReport.from_json(content)
