"""The check of a recipe's gates against reports."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qyolo_deploy.recipe import Gate
from qyolo_deploy.validate.report import EvalReport

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class GateResult:
    """The outcome of one gate.

    Attributes:
        gate: The gate.
        observed: The view's number; None where there is none.
        reference: The other view's number, for a relative gate.
        value: What was compared with the bound; None where it could not be computed.
        passed: Whether the gate held.
        reason: One line that states the comparison, or what was missing.
    """

    gate: Gate
    observed: float | None
    reference: float | None
    value: float | None
    passed: bool
    reason: str


def check_gates(gates: Sequence[Gate], reports: Mapping[str, EvalReport]) -> list[GateResult]:
    """Check gates against reports.

    A number that is missing (no such view, no such metric, nothing measured) fails its gate: what was not
    measured is not proven.

    Args:
        gates: The conditions.
        reports: By view.

    Returns:
        One result a gate, in their order.
    """
    contents = {view: report.to_json() for view, report in reports.items()}
    return [_check(gate, contents) for gate in gates]


def _check(gate: Gate, reports: Mapping[str, Mapping[str, Any]]) -> GateResult:
    observed = _lookup(reports, gate.view, gate.metric)
    if isinstance(observed, str):
        return GateResult(gate, None, None, None, False, observed)
    if gate.relative_to is None:
        return _compare(gate, observed, None, observed, f"{gate.view} {gate.metric} {observed:.6g}")
    reference = _lookup(reports, gate.relative_to, gate.metric)
    if isinstance(reference, str):
        return GateResult(gate, observed, None, None, False, reference)
    if gate.mode == "ratio" and reference == 0:
        reason = f"{gate.relative_to} {gate.metric} is 0, so there is no ratio to it"
        return GateResult(gate, observed, reference, None, False, reason)
    value, sign = (observed / reference, "/") if gate.mode == "ratio" else (observed - reference, "-")
    terms = f"{gate.view} {gate.metric} {observed:.6g} {sign} {gate.relative_to} {reference:.6g} = {value:.6g}"
    return _compare(gate, observed, reference, value, terms)


def _compare(gate: Gate, observed: float, reference: float | None, value: float, terms: str) -> GateResult:
    passed = bool(_OPERATORS[gate.op](value, gate.bound))
    reason = f"{terms} is {'' if passed else 'not '}{gate.op} {gate.bound:.6g}"
    return GateResult(gate, observed, reference, value, passed, reason)


def _lookup(reports: Mapping[str, Mapping[str, Any]], view: str, metric: str) -> float | str:
    """Return the number at a dotted path of a view's report, or why there is none."""
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
