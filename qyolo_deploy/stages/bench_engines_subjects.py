"""What `qyolo bench engines` is given: engine files, precision hints, and which of them is the baseline."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qyolo_deploy.engines.base import Mode
from qyolo_deploy.errors import InputError

HINTS = ("f32", "bf16", "f16")
_SEPARATOR = "@"
_RUNTIMES = {".onnx": "onnxruntime", ".engine": "tensorrt", ".plan": "tensorrt"}


@dataclass(frozen=True)
class BenchEnginesSettings:
    """How it is measured.

    Args:
        imgsz: Side of the image in pixels.
        rounds: In which each engine gets its turn.
        runs: Inferences of a turn.
        threads: Of each engine; None leaves it to its runtime.
        conf: Engines that end at raw head maps have their candidates above it decoded.
        batch: Images of an inference.
        mode: One inference at a time, or as many at once as the engine takes.
        memory: Whether a process of its own tells each engine's peak memory.

    Raises:
        InputError: A number is out of its range.
    """

    imgsz: int = 640
    rounds: int = 9
    runs: int = 10
    threads: int | None = None
    conf: float = 0.25
    batch: int = 1
    mode: Mode = "latency"
    memory: bool = False

    def __post_init__(self) -> None:
        if self.imgsz < 32 or self.imgsz % 32:
            raise InputError(f"imgsz is {self.imgsz}, expected a multiple of 32")
        for name, least in {"rounds": 2, "runs": 1, "threads": 1, "batch": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name} is {value}, expected at least {least}")
        if not 0 <= self.conf <= 1:
            raise InputError(f"conf is {self.conf}, expected 0 to 1")


@dataclass(frozen=True)
class Subject:
    """One row of the table.

    Args:
        name: What the row is called.
        path: The engine; None where there is none.
        runtime: `onnxruntime`, `openvino` or `tensorrt`.
        hint: Precision that OpenVINO is asked to compute in.
        note: What a reader should know, or why there is no engine.
        required: Whether it is an error if the engine cannot be opened; else the row tells the reason.
    """

    name: str
    path: Path | None
    runtime: str
    hint: str | None = None
    note: str = ""
    required: bool = True

    @property
    def label(self) -> str:
        """Name and hint, as the command line takes them."""
        return self.name if self.hint is None else f"{self.name}{_SEPARATOR}{self.hint}"


def check_hints(hints: Sequence[str]) -> None:
    """Refuses precision hints that OpenVINO does not know.

    Raises:
        InputError: One is none.
    """
    for hint in hints:
        if hint not in HINTS:
            raise InputError(f"precision hint '{hint}': expected one of {', '.join(HINTS)}")


def with_hints(name: str, path: Path, hints: Sequence[str], note: str = "", required: bool = True) -> list[Subject]:
    """The rows of an engine: one, or for OpenVINO one for each precision hint."""
    if (runtime := _RUNTIMES.get(path.suffix)) is not None:
        return [Subject(name, path, runtime, None, note, required)]
    return [Subject(name, path, "openvino", hint, note, required) for hint in hints]


def parse_engines(texts: Sequence[str], hints: Sequence[str], baseline: str | None = None) -> list[Subject]:
    """Rows for engines as the command line names them.

    Args:
        texts: Paths; `path@bf16` asks OpenVINO for that precision.
        hints: Of OpenVINO engines that name none; each of them makes a row.
        baseline: Another engine, which becomes the first row unless it is one of these or no file at all.

    Raises:
        InputError: There is no such engine, a hint is none or for another runtime, or one is listed twice.
    """
    check_hints(hints)
    found = [subject for text in texts for subject in _parse(text, hints)]
    is_other = baseline is not None and not any(_is(subject, baseline) for subject in found)
    if baseline is not None and is_other and Path(_split(baseline)[0]).exists():
        found = [*_parse(baseline, hints[:1]), *found]
    for (path, _), count in Counter((subject.path, subject.hint) for subject in found).items():
        if count > 1:
            raise InputError(f"{path}: is listed {count} times with the same precision hint")
    shared = Counter(path.name for path in {subject.path for subject in found} if path is not None)
    return [_renamed(subject, shared) for subject in found]


def _split(text: str) -> tuple[str, str]:
    """Path and hint; a path may itself hold the separator."""
    path, _, hint = text.rpartition(_SEPARATOR)
    return (text, "") if not path or Path(text).exists() else (path, hint)


def _parse(text: str, hints: Sequence[str]) -> list[Subject]:
    path, hint = _split(text)
    engine = Path(path)
    if not engine.exists():
        raise InputError(f"{text}: no such engine")
    if hint and engine.suffix in _RUNTIMES:
        raise InputError(f"{text}: only OpenVINO takes a precision hint")
    if hint:
        check_hints([hint])
    return with_hints(path, engine, [hint] if hint else hints)


def _renamed(subject: Subject, shared: Counter[str]) -> Subject:
    """The file's own name is enough where no other engine has it."""
    short = "" if subject.path is None else subject.path.name
    return replace(subject, name=short) if shared[short] == 1 else subject


def find_baseline(subjects: Sequence[Subject], text: str | None) -> int:
    """Index of the row that the others are compared with.

    Args:
        subjects: All rows.
        text: A row's name or path, alone or with its hint; None takes the first row with an engine.

    Raises:
        InputError: There is no such row, or it has no engine.
    """
    named = [index for index, subject in enumerate(subjects) if text is None or _is(subject, text)]
    for index in named:
        if subjects[index].path is not None:
            return index
    if text is None:
        reason = next((f" ({subject.note})" for subject in subjects if subject.note), "")
        raise InputError(f"there is no engine to measure{reason}", "Name one, or make some with --peers or --schemes.")
    if named:
        raise InputError(f"--baseline {text}: {subjects[named[0]].note}")
    raise InputError(f"--baseline {text}: expected one of {', '.join(subject.label for subject in subjects)}")


def _is(subject: Subject, text: str) -> bool:
    names = (subject.name, str(subject.path))
    return text in names or text in [f"{name}{_SEPARATOR}{subject.hint}" for name in names]
