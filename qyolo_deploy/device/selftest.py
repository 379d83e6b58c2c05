"""Running the golden vectors of a release, as `qyolo selftest` does it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qyolo_deploy.device.machine import describe_machine
from qyolo_deploy.device.results import Difference, best_detections, compare_detections, compare_output, run_engine
from qyolo_deploy.engines.base import Runner, open_engine
from qyolo_deploy.errors import InputError, IntegrityError, RuntimeMissingError
from qyolo_deploy.release.golden import (
    Golden,
    GoldenEngine,
    GoldenResult,
    Tolerance,
    read_detections,
    read_golden,
    read_image,
    read_output,
)
from qyolo_deploy.release.manifest import EngineEntry
from qyolo_deploy.release.verify import VerifiedRelease

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EngineCheck:
    """What came of one engine.

    Attributes:
        view: Its name in the release.
        status: `ok`, `off` where it is out of tolerance, `not run` where its runtime is not installed.
        same_machine: Whether runtime, version and processor are those that made the vectors.
        difference: The worst of all inputs; None where it was not run.
        tolerance: That was applied.
        detections: Detections that were compared.
        note: Why it was not run.
    """

    view: str
    status: str
    same_machine: bool = False
    difference: Difference | None = None
    tolerance: Tolerance | None = None
    detections: int = 0
    note: str = ""

    def describe(self) -> str:
        """The outcome in a clause."""
        if self.difference is None or self.tolerance is None:
            return f"{self.view} was not run: {self.note}"
        found, allowed = self.difference, self.tolerance
        return (
            f"{self.view} differs by {found.relative_error:.3g} (at most {allowed.relative_error:g}), "
            f"scores by {found.score:.3g} (at most {allowed.score:g}), IoU {found.iou:.3g} (at least {allowed.iou:g})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        tolerance = None if self.tolerance is None else self.tolerance.model_dump()
        return asdict(self) | {"tolerance": tolerance}


def selftest(
    release: VerifiedRelease, engine: str | None = None, progress: Progress | None = None
) -> list[EngineCheck]:
    """Runs the engines of a release on its golden inputs.

    Args:
        release: A verified release.
        engine: View to run; by default all, of which those without an installed runtime are told, not run.
        progress: Called with runs done and in total.

    Returns:
        One check an engine; it is the caller that refuses one with the status `off`.

    Raises:
        InputError: The release has no such engine.
        RuntimeMissingError: The runtime of the named engine, or of all engines, is not installed.
        IntegrityError: The release has no golden vectors, or damaged ones.
    """
    golden = read_golden(release.path)
    entries = {entry.view: entry for entry in release.manifest.engines}
    chosen = _chosen(golden, entries, engine)
    total, done, checks = sum(len(entry.results) for entry in chosen), 0, []
    for vectors in chosen:
        entry = entries[vectors.view]
        try:
            runner = open_release_engine(release, entry)
        except RuntimeMissingError as error:
            if engine is not None:
                raise
            checks.append(EngineCheck(vectors.view, "not run", note=str(error)))
            continue
        check = _Check(release, golden, runner, vectors)
        for result in vectors.results:
            check.add(result)
            done += 1
            if progress is not None:
                progress(done, total)
        checks.append(check.outcome())
    if all(check.status == "not run" for check in checks):
        raise RuntimeMissingError(f"{release.path}: {checks[0].note}, and no other engine of it can be run here")
    return checks


def open_release_engine(release: VerifiedRelease, entry: EngineEntry) -> Runner:
    """Loads an engine of a release as it was validated.

    Raises:
        RuntimeMissingError: Its runtime is not installed.
    """
    conf = release.manifest.postprocessing.conf
    return open_engine(release.path / entry.path, entry.precision_hint or "f32", conf)


def _chosen(golden: Golden, entries: Mapping[str, EngineEntry], engine: str | None) -> list[GoldenEngine]:
    views = {vectors.view: vectors for vectors in golden.engines}
    if unknown := sorted(set(views) - set(entries)):
        raise IntegrityError(f"The golden vectors name an engine {unknown[0]!r} that the manifest does not have.")
    if engine is None:
        return list(golden.engines)
    if engine not in views:
        raise InputError(f"--engine {engine}: expected one of {', '.join(views)}")
    return [views[engine]]


class _Check:
    """The runs of one engine and what they add up to."""

    def __init__(self, release: VerifiedRelease, golden: Golden, runner: Runner, vectors: GoldenEngine) -> None:
        self._root, self._thresholds = release.path, release.manifest.postprocessing
        self._golden, self._runner, self._vectors = golden, runner, vectors
        self._difference, self._detections = Difference(), 0

    def add(self, entry: GoldenResult) -> None:
        if entry.input >= len(self._golden.inputs):
            raise IntegrityError(f"The golden vectors name an input {entry.input} that there is not.")
        found = run_engine(self._runner, read_image(self._root, self._golden.inputs[entry.input]), self._thresholds)
        expected = read_detections(self._root, entry)
        difference = compare_detections(found.detections, expected, self._golden)
        for output in entry.outputs:
            indices, values = read_output(self._root, output)
            value = found.outputs.get(output.name)
            if value is None or value.shape != output.shape:
                shape = "no such output" if value is None else str(list(value.shape))
                place = f"{self._runner.path}: output {output.name!r}"
                raise IntegrityError(f"{place}: expected {list(output.shape)} as in the golden vectors, found {shape}.")
            difference = difference.worse(compare_output(output, value, indices, values))
        self._difference = self._difference.worse(difference)
        self._detections += len(best_detections(expected, self._golden))

    def outcome(self) -> EngineCheck:
        is_same = describe_machine(self._runner.runtime) == self._vectors.machine
        tolerance = self._vectors.same_machine if is_same else self._vectors.other_machine
        status = "ok" if self._difference.within(tolerance) else "off"
        return EngineCheck(self._vectors.view, status, is_same, self._difference, tolerance, self._detections)
