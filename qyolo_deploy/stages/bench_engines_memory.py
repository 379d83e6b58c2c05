"""How much memory an engine takes: a process of its own opens it, runs it, and tells its peak."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qyolo_deploy.engines.base import open_engine
from qyolo_deploy.errors import QyoloError
from qyolo_deploy.stages.bench_engines_inputs import example_image
from qyolo_deploy.stages.bench_engines_subjects import BenchEnginesSettings, Subject

_RUNS = 3


def peak_memory(subject: Subject, settings: BenchEnginesSettings) -> dict[str, int]:
    """Peak resident memory of a process that opens an engine and runs it.

    Args:
        subject: A row with an engine.
        settings: Size and number of images, threads and mode.

    Returns:
        `peak_bytes` of the whole process, and `engine_bytes`, by which that is above what Python and this package
        take before the engine is opened.

    Raises:
        QyoloError: The process failed.
    """
    job = {"path": str(subject.path), "hint": subject.hint or "f32", "settings": asdict(settings)}
    command = [sys.executable, "-m", __name__, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QyoloError(f"{subject.path}: its memory cannot be measured ({done.stderr.strip().splitlines()[-1:]})")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peak_bytes() -> int:
    """Peak of this process. On Linux `getrusage` would count the parent's, which it inherits."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: Sequence[str]) -> None:
    """The process itself."""
    job = json.loads(arguments[0])
    settings = BenchEnginesSettings(**job["settings"])
    example = example_image(settings.imgsz, None, settings.batch)
    before = _peak_bytes()
    runner = open_engine(Path(job["path"]), job["hint"], settings.conf, settings.threads, settings.mode)
    for _ in range(_RUNS):
        runner(example)
    peak = _peak_bytes()
    print(json.dumps({"peak_bytes": peak, "engine_bytes": peak - before}))


if __name__ == "__main__":
    main(sys.argv[1:])
