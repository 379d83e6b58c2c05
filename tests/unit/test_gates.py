import pytest
from pydantic import ValidationError

from qyolo_deploy.validate.coco_map import CocoMetrics
from qyolo_deploy.validate.gates import Gate, check_gates
from qyolo_deploy.validate.report import EvalReport


def report(name, map50_95, size_bytes=None, latency_ms=None):
    return EvalReport(
        name=name,
        metrics=CocoMetrics(map50_95, 0.5, 0.25, 0.0, None, 0.5, {"traffic.light": 0.375}),
        images=206,
        thresholds={"conf": 0.001, "iou": 0.6, "max_det": 300},
        imgsz=640,
        letterbox="rect",
        precision_hint=None,
        size_bytes=size_bytes,
        latency_ms=latency_ms,
        digests={},
    )


REPORTS = {
    "float": report("float", 0.5, 8_000, {"p50": 20.0, "p95": 30.0}),
    "int8": report("int8", 0.375, 2_000, {"p50": 10.0, "p95": 12.0}),
    "dead": report("dead", 0.0, 0),
}


def check(**gate):
    (outcome,) = check_gates([Gate(**gate)], REPORTS)
    return outcome


@pytest.mark.parametrize(
    ("op", "bound", "passed"),
    [
        (">=", 0.375, True),
        (">", 0.375, False),
        (">", 0.25, True),
        ("<=", 0.375, True),
        ("<", 0.375, False),
        ("<", 0.5, True),
        (">=", 0.5, False),
        ("<=", 0.25, False),
    ],
)
def test_absolute_gate(op, bound, passed):
    outcome = check(view="int8", metric="map50_95", op=op, bound=bound)
    assert outcome.passed is passed
    assert (outcome.observed, outcome.reference, outcome.value) == (0.375, None, 0.375)


def test_difference_is_observed_minus_reference():
    outcome = check(view="int8", metric="map50_95", op=">=", bound=-0.125, relative_to="float")
    assert outcome.passed
    assert (outcome.observed, outcome.reference, outcome.value) == (0.375, 0.5, -0.125)
    assert outcome.reason == "int8 map50_95 0.375 - float 0.5 = -0.125 is >= -0.125"
    worse = check(view="int8", metric="map50_95", op=">=", bound=-0.1, relative_to="float")
    assert not worse.passed
    assert "is not >= -0.1" in worse.reason


def test_ratio_is_observed_by_reference():
    outcome = check(view="int8", metric="latency_ms.p50", op="<", bound=0.75, relative_to="float", mode="ratio")
    assert outcome.passed
    assert outcome.value == 0.5
    size = check(view="int8", metric="size_bytes", op="<=", bound=0.2, relative_to="float", mode="ratio")
    assert not size.passed
    assert size.value == 0.25


def test_class_name_with_a_dot_is_found():
    assert check(view="int8", metric="per_class.traffic.light", op=">", bound=0.3).observed == 0.375


@pytest.mark.parametrize(
    ("view", "metric", "relative_to", "reason"),
    [
        ("tensorrt", "map50_95", None, "no view tensorrt, only float, int8, dead"),
        ("int8", "map50_95", "fake_quantized", "no view fake_quantized"),
        ("int8", "map5095", None, "int8 has no metric map5095"),
        ("int8", "latency_ms.p99", None, "int8 has no metric latency_ms.p99"),
        ("int8", "map50.p50", None, "int8 has no metric map50.p50"),
        ("int8", "map_medium", None, "map_medium was not measured for int8"),
        ("dead", "latency_ms.p50", None, "dead has no metric latency_ms.p50"),
        ("dead", "latency_ms", None, "latency_ms was not measured for dead"),
        ("int8", "latency_ms", None, "latency_ms of int8 is no number"),
        ("int8", "name", None, "name of int8 is no number"),
    ],
)
def test_what_is_missing_fails_with_a_reason(view, metric, relative_to, reason):
    outcome = check(view=view, metric=metric, op="<=", bound=1e9, relative_to=relative_to)
    assert not outcome.passed
    assert outcome.value is None
    assert reason in outcome.reason


def test_ratio_to_zero_fails():
    outcome = check(view="int8", metric="size_bytes", op="<=", bound=1, relative_to="dead", mode="ratio")
    assert not outcome.passed
    assert "no ratio" in outcome.reason


def test_results_follow_the_order_of_the_gates():
    gates = [Gate(view=v, metric="map50_95", op=">", bound=0.4) for v in ("int8", "float", "dead")]
    assert [outcome.passed for outcome in check_gates(gates, REPORTS)] == [False, True, False]


@pytest.mark.parametrize(
    "change",
    [
        {"op": "=="},
        {"bound": float("nan")},
        {"bound": "low"},
        {"mode": "ratio"},
        {"relative_to": "int8"},
        {"unit": "points"},
    ],
)
def test_gate_refuses(change):
    with pytest.raises(ValidationError):
        Gate(**{"view": "int8", "metric": "map50", "op": ">=", "bound": 0.1, **change})
