"""The order of stages, their keys, what is up to date, and going on where a build stopped."""

import fcntl
import importlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qyolo_deploy._version import __version__
from qyolo_deploy.artifact import Artifact, DigestCache, environment_fingerprint, sha256_json
from qyolo_deploy.atomic import atomic_path, write_atomic
from qyolo_deploy.console import Reporter
from qyolo_deploy.engines.requirements import check_targets
from qyolo_deploy.errors import InputError, IntegrityError, RuntimeMissingError
from qyolo_deploy.recipe import Recipe
from qyolo_deploy.recipe_file import load_recipe
from qyolo_deploy.stages.context import StageContext, StageOutput
from qyolo_deploy.stages.plan import Plan

_RECORDS = ".stages"
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_BEFORE_ENGINES = ("data", "float", "train", "correct")


@dataclass(frozen=True)
class Stage:
    """One step of a build.

    Args:
        name: Its name, and that of its folder.
        version: Raised when the same inputs would give another result.
        module: Where its `run` is; imported only when it runs.
        sections: Recipe sections that decide its result.
        needs: Stages whose artifacts it reads.
    """

    name: str
    version: int
    module: str
    sections: tuple[str, ...]
    needs: tuple[str, ...] = ()


STAGES = (
    Stage("data", 1, "data", ("data",)),
    Stage("float", 1, "float_model", ("model", "float"), ("data",)),
    Stage("train", 6, "train", ("model", "data", "quantization", "train"), ("data", "float")),
    Stage("correct", 3, "correct", ("model", "quantization", "correct"), ("data", "float", "train")),
    Stage(
        "export",
        7,
        "export",
        ("name", "description", "model", "export", "release"),
        ("float", "train", "correct"),
    ),
    Stage(
        "validate",
        11,
        "validate",
        ("name", "model", "correct", "export", "validate", "gates", "release"),
        ("data", "float", "train", "correct", "export"),
    ),
    Stage(
        "release",
        3,
        "release",
        ("name", "release"),
        ("data", "float", "train", "correct", "export", "validate"),
    ),
)


@dataclass(frozen=True)
class BuildResult:
    """What a build left behind.

    Args:
        folder: Root of the build.
        ran: Stages that were run.
        up_to_date: Stages that were not, because nothing that decides them has changed.
        views: The measured views, as in `report.json`; empty if the build stopped before validation.
        gates: The gates with their outcomes.
        not_run: Views without numbers: `name`, `status` and `reason`.
    """

    folder: Path
    ran: tuple[str, ...]
    up_to_date: tuple[str, ...]
    views: tuple[dict[str, Any], ...]
    gates: tuple[dict[str, Any], ...]
    not_run: tuple[dict[str, str], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no gate failed."""
        return all(gate["passed"] for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `qyolo build --json` prints it."""
        return {
            "folder": str(self.folder),
            "ran": list(self.ran),
            "up_to_date": list(self.up_to_date),
            "passed": self.passed,
            "views": list(self.views),
            "gates": list(self.gates),
            "not_run": list(self.not_run),
        }


def build(
    recipe: str | Path,
    settings: Sequence[str] = (),
    data: str | Path | None = None,
    out: str | Path = "runs",
    until: str | None = None,
    force: str | None = None,
    reporter: Reporter | None = None,
    share: Path | None = None,
    device: str = "auto",
) -> BuildResult:
    """Runs a recipe from its data to its release, as far as it is not done yet.

    Args:
        recipe: YAML file.
        settings: `key.path=value` overrides.
        data: Dataset that replaces the recipe's `data.source`.
        out: Folder under which `<recipe name>/` is made.
        until: Last stage to run.
        force: Stage to run even if it is up to date.
        reporter: Where progress goes; by default nowhere.
        share: Folder of builds (`<share>/*/<recipe name>/`) whose finished stages are taken over instead of run
            where nothing that decides them differs.
        device: What training computes on: auto (a GPU where there is one), cpu, cuda or cuda:<index>. It decides no
            stage's key: what was trained on one device is up to date on another.

    Returns:
        What was run and measured. A gate that failed is told by `passed`; there is no release then.

    Raises:
        InputError: If recipe, data or weights are not usable.
        RuntimeMissingError: If a package that a stage needs is not installed.
    """
    for argument, value in (("until", until), ("force", force)):
        if value is not None and value not in [stage.name for stage in STAGES]:
            raise InputError(f"--{argument} {value}: expected one of {', '.join(stage.name for stage in STAGES)}")
    if not _DEVICE.fullmatch(device):
        raise InputError(f"--device {device}: expected auto, cpu, cuda or cuda:<index>")
    loaded = load_recipe(Path(recipe), settings)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if rank:
        importlib.import_module("qyolo_deploy.stages.follow").follow()
        return BuildResult(Path(out) / loaded.name, (), (), (), ())
    try:
        return _build_first(loaded, Path(recipe), data, Path(out), until, force, reporter, share, device)
    finally:
        if world > 1:
            importlib.import_module("qyolo_deploy.stages.follow").dismiss_others()


def _build_first(
    loaded: Recipe,
    recipe: Path,
    data: str | Path | None,
    out: Path,
    until: str | None,
    force: str | None,
    reporter: Reporter | None,
    share: Path | None,
    device: str,
) -> BuildResult:
    """The build itself, which of several processes the first one does."""
    plan = Plan(loaded, recipe, data)
    if until not in _BEFORE_ENGINES:
        check_targets({target: loaded.export.storage_of(target) for target in loaded.export.targets})
    folder = out / loaded.name
    if plan.release is not None and plan.release.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{recipe}: validate.last_release: {plan.release} is this build's own release, which it replaces, "
            "expected one that is kept elsewhere",
            hint="Copy the release that is to be compared with.",
        )
    with _folder(folder), _lock(folder), DigestCache(folder / ".digests.json") as digests:
        return _Build(plan, folder, reporter or Reporter(quiet=True), digests, share, device).run(until, force)


class _Build:
    """One build in its folder."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        reporter: Reporter,
        digests: DigestCache,
        share: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self._plan, self._folder, self._reporter, self._digests = plan, folder, reporter, digests
        self._device = device
        self._others = [] if share is None else sorted(share.glob(f"*/{plan.recipe.name}"))
        self._artifacts: dict[str, Artifact] = {}
        self._ran: list[str] = []

    def run(self, until: str | None, force: str | None) -> BuildResult:
        write_atomic(self._folder / "recipe.resolved.yaml", self._plan.recipe.to_yaml())
        for stage in STAGES:
            if stage.name == "release" and not self._gates_passed():
                break
            self._stage(stage, stage.name == force)
            if stage.name == until:
                break
        report = self._artifacts["validate"].info if "validate" in self._artifacts else {}
        return BuildResult(
            folder=self._folder,
            ran=tuple(self._ran),
            up_to_date=tuple(name for name in self._artifacts if name not in self._ran),
            views=tuple(report.get("views", ())),
            gates=tuple(report.get("gates", ())),
            not_run=tuple(report.get("not_run", ())),
        )

    def _gates_passed(self) -> bool:
        if all(gate["passed"] for gate in self._artifacts["validate"].info["gates"]):
            return True
        # A release of an earlier run would look as if it were this one's.
        shutil.rmtree(self._folder / "release", ignore_errors=True)
        return False

    def _stage(self, stage: Stage, forced: bool) -> None:
        inputs = self._plan.inputs(stage.name, self._digests.sha256)
        inputs |= {name: self._artifacts[name].digest for name in stage.needs}
        key = self._key(stage, inputs)
        if forced:  # else training would be taken up where its checkpoint ends, which is at its end
            (self._folder / stage.name / "checkpoint.safetensors").unlink(missing_ok=True)
        artifact = None if forced else self._recorded(stage, key, self._folder) or self._taken_over(stage, key)
        if artifact is None:
            artifact = self._execute(stage, key, inputs)
            self._ran.append(stage.name)
        self._artifacts[stage.name] = artifact

    def _key(self, stage: Stage, inputs: Mapping[str, str]) -> str:
        sections = {name: self._plan.recipe.section(name) for name in stage.sections}
        return sha256_json([stage.name, stage.version, sections, dict(inputs)])

    def _taken_over(self, stage: Stage, key: str) -> Artifact | None:
        """The same stage's artifact from another build."""
        for other in self._others:
            if other == self._folder or (artifact := self._recorded(stage, key, other)) is None:
                continue
            for file in artifact.files:
                with atomic_path(self._folder / file.path) as temporary:
                    shutil.copyfile(other / file.path, temporary)
            self._record(artifact)
            self._log(stage.name, "taken over", source=str(other))
            return artifact
        return None

    def _record(self, artifact: Artifact) -> None:
        write_atomic(self._folder / _RECORDS / f"{artifact.stage}.json", json.dumps(artifact.to_json(), indent=1))

    def _recorded(self, stage: Stage, key: str, folder: Path) -> Artifact | None:
        """The stage's artifact if it is up to date: same key, all files as they were written."""
        try:
            text = (folder / _RECORDS / f"{stage.name}.json").read_text(encoding="utf-8")
            artifact = Artifact.from_json(json.loads(text))
            if artifact.key != key:
                return None
            artifact.verify(folder)
        except (OSError, ValueError):
            return None
        except IntegrityError as error:
            self._reporter.note(f"{stage.name}: {error} It is made again.")
            return None
        return artifact

    def _execute(self, stage: Stage, key: str, inputs: dict[str, str]) -> Artifact:
        self._reporter.note(f"{stage.name} ...")
        start = time.monotonic()
        self._log(stage.name, "start", key=key)
        output = _load(stage)(
            StageContext(
                recipe=self._plan.recipe,
                folder=self._folder,
                key=key,
                source=self._plan.source,
                unlabeled=self._plan.unlabeled,
                calibration=self._plan.calibration,
                weights=self._plan.weights,
                architecture=self._plan.architecture,
                artifacts=self._artifacts,
                reporter=self._reporter,
                device=self._device,
                previous_release=self._plan.release,
            )
        )
        artifact = Artifact.of_files(
            self._folder,
            [file.relative_to(self._folder) for file in output.files],
            kind=output.kind,
            stage=stage.name,
            key=key,
            inputs=inputs,
            environment=environment_fingerprint(("torch", "onnxruntime", "openvino")) | {"qyolo_deploy": __version__},
            info=output.info,
        )
        self._record(artifact)
        seconds = round(time.monotonic() - start, 1)
        self._log(stage.name, "end", seconds=seconds)
        self._reporter.note(f"{stage.name}: {seconds} s")
        return artifact

    def _log(self, stage: str, event: str, **facts: object) -> None:
        entry = {"time": round(time.time(), 3), "stage": stage, "event": event, **facts}
        with (self._folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _load(stage: Stage) -> Callable[[StageContext], StageOutput]:
    try:
        run: Callable[[StageContext], StageOutput] = importlib.import_module(f"qyolo_deploy.stages.{stage.module}").run
    except ModuleNotFoundError as error:
        raise RuntimeMissingError(
            f"stage {stage.name}: the package '{error.name}' is not installed",
            hint='pip install "qyolo_deploy[build]"',
        ) from error
    return run


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Makes the build's folder; bad input leaves nothing behind unless a model had already been made there."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        (folder / _RECORDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})", hint="--out names another place.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder}: not writable", hint="--out names another place.")
    try:
        yield
    except (InputError, IntegrityError, OSError):
        if folder in made and not (folder / _RECORDS / "float.json").exists():
            shutil.rmtree(folder)
            for parent in made[1:]:
                parent.rmdir()
        raise


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps a second build out of the folder, and sweeps away what a killed one left half-written."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{folder}: another build is running there") from error
        for leftover in [*folder.rglob(".*.partial*"), *folder.rglob(".*.tmp")]:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        yield
