import json

import numpy as np
import pytest
from pydantic import ValidationError

from qyolo_deploy.errors import InputError
from qyolo_deploy.validate.bootstrap import Bootstrap
from qyolo_deploy.validate.coco_map import CocoMetrics
from qyolo_deploy.validate.gates import Gate, check_gates
from qyolo_deploy.validate.last_release import read_release
from qyolo_deploy.validate.matches import ClassMatches
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


# --- confidence, and the last release -----------------------------------------------------------------------


def found_objects(count, images=60):
    """Resampled figures of a view that finds the one object of each of the first `count` images, and nothing else."""
    matched = np.zeros((4, 10, images), bool)
    matched[..., :count] = True
    matches = ClassMatches(np.arange(images), matched, np.zeros_like(matched), np.ones((4, images), np.int64))
    return Bootstrap({"cat": matches}, images, resamples=400)


RESAMPLED = {"float": found_objects(50), "int8": found_objects(45)}


def confident(metric="map50_95", last_release=None, **gate):
    (outcome,) = check_gates([Gate(view="int8", metric=metric, **gate)], REPORTS, RESAMPLED, last_release)
    return outcome


def test_confidence_asks_the_bound_of_the_interval_and_not_of_the_number():
    ours, theirs = (RESAMPLED[view].samples("map50_95") for view in ("int8", "float"))
    low, high = np.quantile(ours - theirs, (0.05, 0.95))
    assert low < -0.1 < high  # of 60 images, 5 fewer
    for op, end, bound, passed in (
        (">=", low, low - 0.01, True),
        (">=", low, low + 0.01, False),
        ("<=", high, high, True),
    ):
        outcome = confident(op=op, bound=bound, relative_to="float", confidence=0.95)
        assert outcome.passed is passed
        assert outcome.at_confidence == pytest.approx(end)
        assert outcome.value == -0.125  # the reports' own difference
    failed = confident(op=">=", bound=low + 0.01, relative_to="float", confidence=0.95)
    assert failed.missed_by == pytest.approx(0.01)
    assert "at 0.95 confidence) is not >=" in failed.reason and failed.reason.endswith(", by 0.01")


def test_confidence_in_a_ratio_and_in_the_number_itself():
    ours, theirs = (RESAMPLED[view].samples("map50") for view in ("int8", "float"))
    ratio = confident("map50", op=">=", bound=0.5, relative_to="float", mode="ratio", confidence=0.9)
    assert ratio.at_confidence == pytest.approx(np.quantile(ours / theirs, 0.1))
    alone = confident("per_class.cat", op="<=", bound=1, confidence=0.9)
    assert not alone.passed and "has no metric per_class.cat" in alone.reason
    assert confident("map50", op="<=", bound=1, confidence=0.9).at_confidence == pytest.approx(np.quantile(ours, 0.9))


def test_what_was_not_resampled_has_no_confidence():
    (outcome,) = check_gates([Gate(view="int8", metric="map50", op=">=", bound=0, confidence=0.9)], REPORTS)
    assert not outcome.passed and "no confidence" in outcome.reason
    nowhere = confident("per_class.traffic.light", op=">=", bound=0, confidence=0.9)
    assert not nowhere.passed and "no confidence" in nowhere.reason


@pytest.mark.parametrize(
    "change", [{"metric": "latency_ms.p50", "confidence": 0.95}, {"confidence": 0.4}, {"confidence": 1.0}]
)
def test_confidence_is_refused_where_it_means_nothing(change):
    with pytest.raises(ValidationError):
        Gate(**{"view": "int8", "metric": "map50", "op": ">=", "bound": 0.1, **change})


def test_the_last_release_is_a_reference():
    last = {"int8": {"map50_95": 0.5, "latency_ms": {"p50": float("nan")}}}
    outcome = confident(last_release=last, op=">=", bound=-0.1, relative_to="release")
    assert (outcome.reference, outcome.value, outcome.passed) == (0.5, -0.125, False)
    assert outcome.missed_by == pytest.approx(0.025)
    assert confident(last_release=last, op=">=", bound=-0.2, relative_to="release").passed
    certain = confident(last_release=last, op=">=", bound=-1, relative_to="release", confidence=0.9)
    assert certain.at_confidence == pytest.approx(np.quantile(RESAMPLED["int8"].samples("map50_95"), 0.1) - 0.5)


@pytest.mark.parametrize(
    ("metric", "reason"),
    [("latency_ms.p50", "last release: latency_ms.p50 of int8 is nan"), ("size_bytes", "last release: int8 has no")],
)
def test_what_the_last_release_does_not_tell_fails(metric, reason):
    last = {"int8": {"latency_ms": {"p50": float("nan")}}}
    outcome = confident(metric, last_release=last, op="<=", bound=1e9, relative_to="release")
    assert not outcome.passed and reason in outcome.reason


def test_a_release_is_read_from_its_folder_or_its_report(tmp_path):
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"views": [report("int8", 0.25).to_json()]}))
    for path in (tmp_path, file):
        assert read_release(path)["int8"]["map50_95"] == 0.25
    for text in ("{", "{}", '{"views": [3]}', '{"views": null}'):
        file.write_text(text)
        with pytest.raises(InputError, match=r"report\.json: not the report of a build"):
            read_release(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=r"expected a release folder with report\.json"):
        read_release(tmp_path)
