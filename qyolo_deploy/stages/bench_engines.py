"""`qyolo bench engines`: speed and size of engines beside what users would take instead.

All engines are open at the same time and take turns, so that within a round the machine is nearly the same for all.
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qyolo_deploy._version import __version__
from qyolo_deploy.artifact import environment_fingerprint
from qyolo_deploy.console import Tick
from qyolo_deploy.engines.base import Runner, engine_files
from qyolo_deploy.engines.kernels import kernel_table
from qyolo_deploy.engines.onnxruntime import OnnxRuntimeRunner
from qyolo_deploy.engines.openvino import OpenVinoRunner
from qyolo_deploy.engines.tensorrt_runtime import FLAVORS, find_device
from qyolo_deploy.errors import InputError, QyoloError, RuntimeMissingError
from qyolo_deploy.stages.bench_engines_inputs import Images, calls_at_a_time, example_image, make_call
from qyolo_deploy.stages.bench_engines_memory import peak_memory
from qyolo_deploy.stages.bench_engines_subjects import BenchEnginesSettings, Subject, find_baseline
from qyolo_deploy.stages.bench_engines_turns import load, summarize, take_turns
from qyolo_deploy.validate.run import digest_engine

_PACKAGES = ("onnxruntime", "openvino", *FLAVORS, "nncf", "ultralytics", "onnx", "torch", "numpy")
_KINDS = ("onnx", "bin", "xml", "engine", "plan")


@dataclass(frozen=True)
class _Opened:
    """An engine that is ready for its turns."""

    runner: Runner
    load_ms: list[float]


def run_bench(
    subjects: Sequence[Subject],
    settings: BenchEnginesSettings,
    baseline: str | None = None,
    progress: Tick | None = None,
    image: Path | None = None,
) -> dict[str, Any]:
    """Measures latency, load time and size of engines.

    Args:
        subjects: The rows; those without an engine stay in, with their note.
        settings: How it is measured.
        baseline: Row that the others are compared with; by default the first one with an engine.
        progress: Called after each turn.
        image: What the engines look at; by default coloured patches.

    Returns:
        The settings, the machine and its load before and after, and a row for each subject, see `summarize`; times are
        those of `images_per_call` images, `load_ms` is the median of several loads, `files` the bytes of each kind of
        file.

    Raises:
        InputError: A required engine cannot be opened or does not take images of this size, or the baseline is not
            usable.
        RuntimeMissingError: The runtime of a required engine is not installed.
    """
    find_baseline(subjects, baseline)  # before anything takes long
    before, example = os.getloadavg(), example_image(settings.imgsz, image, settings.batch)
    checked = [_open(subject, settings, example) for subject in subjects]
    subjects, opened = [subject for subject, _ in checked], [engine for _, engine in checked]
    reference = find_baseline(subjects, baseline)
    count = calls_at_a_time([engine.runner for engine in opened if engine is not None])
    times = _measure(subjects, opened, settings, example, count, progress)
    rows = [
        _row(subject, engine, times.get(index), times[reference], settings, count * settings.batch)
        for index, (subject, engine) in enumerate(zip(subjects, opened, strict=True))
    ]
    return {
        **asdict(settings),
        "images_per_call": count * settings.batch,
        "image": None if image is None else str(image),
        "baseline": subjects[reference].label,
        "environment": environment_fingerprint(_PACKAGES) | {"qyolo_deploy": __version__} | _gpu(),
        "cores": os.cpu_count(),
        "load_average": {"before": list(before), "after": list(os.getloadavg())},
        "rows": rows,
    }


def _gpu() -> dict[str, str]:
    device = find_device()
    return {} if device is None else {"gpu": device.name, "driver": device.driver}


def _open(subject: Subject, settings: BenchEnginesSettings, example: Images) -> tuple[Subject, _Opened | None]:
    """The engine; the row without one where it is not required, or is TensorRT's and not for this machine."""
    if subject.path is None:
        return subject, None
    try:
        opened = _Opened(*load(subject, settings))
        fixed, imgsz = opened.runner.imgsz, example.shape[2]
        if fixed not in (None, (imgsz, imgsz)):
            raise InputError(f"{subject.path}: its input is fixed to {fixed[1]} x {fixed[0]} px, but imgsz is {imgsz}")
        opened.runner(example)
    except QyoloError as error:
        is_elsewhere = subject.runtime == "tensorrt" and isinstance(error, RuntimeMissingError)
        if subject.required and not is_elsewhere:
            raise
        return Subject(subject.name, None, subject.runtime, subject.hint, str(error), required=False), None
    return subject, opened


def _measure(
    subjects: Sequence[Subject],
    opened: Sequence[_Opened | None],
    settings: BenchEnginesSettings,
    example: Images,
    count: int,
    tick: Tick | None,
) -> dict[int, list[list[float]]]:
    """Times of the engines that there are, by row."""
    present = [index for index, engine in enumerate(opened) if engine is not None]

    def progress(done: int, total: int, which: int) -> None:
        if tick is not None:
            tick(done, total, subjects[present[which]].label)

    calls = [make_call(engine.runner, example, count) for engine in opened if engine is not None]
    times = take_turns(calls, settings.rounds, settings.runs, progress)
    return dict(zip(present, times, strict=True))


def _row(
    subject: Subject,
    opened: _Opened | None,
    times: list[list[float]] | None,
    baseline: list[list[float]],
    settings: BenchEnginesSettings,
    images: int,
) -> dict[str, Any]:
    names: dict[str, Any] = {
        "name": subject.name,
        "path": None if subject.path is None else str(subject.path),
        "runtime": subject.runtime,
        "precision_hint": subject.hint,
        "note": subject.note,
    }
    if opened is None or times is None:
        return names
    assert subject.path is not None
    files = _sizes(subject.path)
    found = summarize(times, baseline)
    return {
        **names,
        **(peak_memory(subject, settings) if settings.memory else {}),
        "parallel": opened.runner.parallel,
        "fixed_input": opened.runner.imgsz is not None,
        "digest": digest_engine(subject.path),
        "load_ms": statistics.median(opened.load_ms),
        "size_bytes": sum(files.values()),
        "files": files,
        "images_per_s": images / found["p50_ms"] * 1e3,
        **found,
    }


def profile_table(subjects: Sequence[Subject], settings: BenchEnginesSettings) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what engines spend their time on, by kind and precision of their kernels.

    Args:
        subjects: Rows; those of TensorRT and those without an engine are left out.
        settings: Image size, and runs of which the median counts.
    """
    rows, example = [], example_image(settings.imgsz, None)
    for subject in subjects:
        if subject.path is None or subject.runtime not in ("onnxruntime", "openvino"):
            continue
        runner: OnnxRuntimeRunner | OpenVinoRunner
        if subject.runtime == "openvino":
            runner = OpenVinoRunner(subject.path, subject.hint or "f32", settings.conf, settings.threads)
        else:
            runner = OnnxRuntimeRunner(subject.path, settings.conf, settings.threads)
        for kind, precision, count, time_ms in kernel_table(runner.profile(example, settings.runs)):
            rows.append([subject.label, kind, precision, str(count), f"{time_ms:.2f}"])
    return ["engine", "kernel", "precision", "number", "ms"], rows


def _sizes(path: Path) -> dict[str, int]:
    """Bytes by kind of file; of OpenVINO the network and its weights, without what describes them."""
    if path.suffix == ".xml":
        found = [path, path.with_suffix(".bin")]
    else:
        found = [file for file in engine_files(path) if file.suffix[1:] in _KINDS]
    return {file.suffix[1:]: file.stat().st_size for file in found if file.exists()}


def bench_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows for people."""
    head = ["engine", "runtime", "hint", "p50 ms", f"time / {result['baseline']}'s", "min..max", "p95 ms", "p99 ms"]
    head += ["images/s", "load ms", "MB (.bin + .xml)", *(["peak MB"] if result["memory"] else []), "note"]
    rows = []
    for row in result["rows"]:
        cells = ["-"] * (len(head) - 4)
        if "ratio" in row:
            ratio, sizes = row["ratio"], row["files"]
            megabytes = " + ".join(f"{sizes[kind] / 1e6:.2f}" for kind in _KINDS if kind in sizes)
            spread = f"{ratio['min']:.2f}..{ratio['max']:.2f}"
            cells = [f"{row['p50_ms']:.1f}", f"{ratio['median']:.2f}", spread]
            cells += [f"{row['p95_ms']:.1f}", f"{row['p99_ms']:.1f}", f"{row['images_per_s']:.1f}"]
            cells += [f"{row['load_ms']:.0f}", megabytes]
            cells += [f"{row['peak_bytes'] / 1e6:.0f}"] if result["memory"] else []
        rows.append([row["name"], row["runtime"], row["precision_hint"] or "-", *cells, row["note"]])
    return head, rows


def caption(result: Mapping[str, Any]) -> str:
    """One line on how and where it was measured."""
    machine, load_average = result["environment"], result["load_average"]
    told = ("onnxruntime", "openvino", *FLAVORS, "gpu")
    versions = ", ".join(f"{name} {machine[name]}" for name in told if name in machine)
    threads = "the runtimes' choice" if result["threads"] is None else result["threads"]
    load_1min = "{:.1f} to {:.1f}".format(load_average["before"][0], load_average["after"][0])
    what = "inferences" if result["images_per_call"] == 1 else f"times {result['images_per_call']} images"
    return (
        f"{result['imgsz']} px, {result['rounds']} rounds of {result['runs']} {what}, threads: {threads}; "
        f"{machine['cpu']}, {result['cores']} cores, load {load_1min}; {versions}"
    )
