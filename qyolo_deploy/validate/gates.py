"""The check of a recipe's gates against reports."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qyolo_deploy.recipe import LAST_RELEASE, Gate
from qyolo_deploy.validate.bootstrap import Bootstrap, Float64
from qyolo_deploy.validate.report import EvalReport

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class GateResult:
    """The outcome of one gate.

    Attributes:
        gate: The gate.
        observed: The view's number; None where there is none.
        reference: The other view's number, for a relative gate.
        value: The number itself, or its relation to the other; None where it could not be computed.
        passed: Whether the gate held.
        reason: One line that states the comparison, or what was missing.
        at_confidence: The end of the value's interval that was compared with the bound, for a gate with confidence.
        missed_by: How far what was compared lies from the bound, for a gate that failed.
    """

    gate: Gate
    observed: float | None
    reference: float | None
    value: float | None
    passed: bool
    reason: str
    at_confidence: float | None = None
    missed_by: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The gate and its outcome as one flat object."""
        outcome = {key: value for key, value in asdict(self).items() if key != "gate"}
        return {**self.gate.model_dump(exclude={"at"}), **outcome}


def check_gates(
    gates: Sequence[Gate],
    reports: Mapping[str, EvalReport],
    resampled: Mapping[str, Bootstrap] | None = None,
    last_release: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[GateResult]:
    """Check gates against reports.

    A number that is missing (no such view, no such metric, nothing measured) fails its gate: what was not
    measured is not proven.

    Args:
        gates: The conditions.
        reports: By view.
        resampled: The views on the same resampled images, for gates with confidence.
        last_release: Reports of the last release by view, as JSON.

    Returns:
        One result a gate, in their order.
    """
    contents = {view: report.to_json() for view, report in reports.items()}
    return [_check(gate, contents, resampled or {}, last_release or {}) for gate in gates]


def _check(
    gate: Gate,
    reports: Mapping[str, Mapping[str, Any]],
    resampled: Mapping[str, Bootstrap],
    last_release: Mapping[str, Mapping[str, Any]],
) -> GateResult:
    observed = _lookup(reports, gate.view, gate.metric)
    if isinstance(observed, str):
        return GateResult(gate, None, None, None, False, observed)
    if gate.relative_to is None:
        terms = f"{gate.view} {gate.metric} {observed:.6g}"
        return _compare(gate, observed, None, observed, terms, _samples(gate, None, resampled))
    if gate.relative_to == LAST_RELEASE:
        reference = _lookup(last_release, gate.view, gate.metric, "the last release")
    else:
        reference = _lookup(reports, gate.relative_to, gate.metric)
    if isinstance(reference, str):
        return GateResult(gate, observed, None, None, False, reference)
    if gate.mode == "ratio" and reference == 0:
        reason = f"{gate.relative_to} {gate.metric} is 0, so there is no ratio to it"
        return GateResult(gate, observed, reference, None, False, reason)
    value, sign = (observed / reference, "/") if gate.mode == "ratio" else (observed - reference, "-")
    terms = f"{gate.view} {gate.metric} {observed:.6g} {sign} {gate.relative_to} {reference:.6g} = {value:.6g}"
    return _compare(gate, observed, reference, value, terms, _samples(gate, reference, resampled))


def _samples(gate: Gate, reference: float | None, resampled: Mapping[str, Bootstrap]) -> Float64 | None:
    """The gate's value on each draw of images; None where no confidence is asked for or the views lack draws."""
    if gate.confidence is None or gate.view not in resampled:
        return None
    ours = resampled[gate.view].samples(gate.metric)
    if ours is None or reference is None:
        return ours
    theirs: Float64 | None = np.full(len(ours), reference)
    if (other := resampled.get(str(gate.relative_to))) is not None:
        theirs = other.samples(gate.metric)
    if theirs is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return ours / theirs if gate.mode == "ratio" else ours - theirs


def _compare(
    gate: Gate, observed: float, reference: float | None, value: float, terms: str, samples: Float64 | None
) -> GateResult:
    compared, end = value, None
    if gate.confidence is not None:
        known = np.empty(0) if samples is None else samples[np.isfinite(samples)]
        if not len(known):
            reason = f"{gate.metric} of {gate.view} cannot be resampled, so there is no confidence in it"
            return GateResult(gate, observed, reference, value, False, reason)
        is_floor = gate.op in (">=", ">")
        compared = end = float(np.quantile(known, 1 - gate.confidence if is_floor else gate.confidence))
        terms += f" ({end:.6g} at {gate.confidence:.4g} confidence)"
    passed = bool(_OPERATORS[gate.op](compared, gate.bound))
    missed_by = None if passed else abs(compared - gate.bound)
    reason = f"{terms} is {'' if passed else 'not '}{gate.op} {gate.bound:.6g}"
    if missed_by is not None:
        reason += f", by {missed_by:.4g}"
    return GateResult(gate, observed, reference, value, passed, reason, end, missed_by)


def _lookup(reports: Mapping[str, Mapping[str, Any]], view: str, metric: str, whose: str = "") -> float | str:
    """Return the number at a dotted path of a view's report, or why there is none."""
    found = _find(reports, view, metric)
    return f"{whose}: {found}".removeprefix(": ") if isinstance(found, str) else found


def _find(reports: Mapping[str, Mapping[str, Any]], view: str, metric: str) -> float | str:
    if view not in reports:
        return f"there is no view {view}, only {', '.join(reports) or 'none at all'}"
    node: Any = reports[view]
    rest = metric
    while rest:
        if not isinstance(node, Mapping):
            return f"{view} has no metric {metric}"
        # A class name may contain dots itself, so the longest key is tried first.
        key, rest = (rest, "") if rest in node else rest.partition(".")[::2]
        if key not in node:
            return f"{view} has no metric {metric}"
        node = node[key]
    if node is None:
        return f"{metric} was not measured for {view}"
    if isinstance(node, bool) or not isinstance(node, int | float):
        return f"{metric} of {view} is no number"
    if not math.isfinite(node):
        return f"{metric} of {view} is {node}"
    return float(node)
