"""The C++ example, built against the headers of ONNX Runtime where a package has them, and run on the wheel's library.

Debian 13 has the headers in libonnxruntime-dev; elsewhere ONNXRUNTIME_INCLUDE names their folder.
"""

import functools
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qyolo_deploy.engines.base import open_engine
from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.export.heads import expose_heads
from qyolo_deploy.graph.simulate import fold_float
from qyolo_deploy.validate.detections import decode

pytestmark = pytest.mark.slow

IMGSZ, IOU, MAX_DET, DETECTIONS = 64, 0.6, 40, 30
NAMES = ["first", 'second "one"', "third\\"]


@pytest.fixture(scope="module")
def program(repository, tmp_path_factory):
    """Function that runs the example on a release."""
    for tool in ("cmake", "c++"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    include = Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime"))
    if not (include / "onnxruntime_cxx_api.h").exists():
        pytest.skip(f"{include} has no onnxruntime_cxx_api.h; Debian 13 has it in libonnxruntime-dev")
    folder = tmp_path_factory.mktemp("cpp")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # for the linker, and for the loader
        (folder / name).symlink_to(library)
    settings = (f"-DONNXRUNTIME_INCLUDE={include}", f"-DONNXRUNTIME_LIBRARY={folder / 'libonnxruntime.so'}")
    for line in (
        (
            "cmake",
            "-S",
            repository / "docker" / "examples" / "cpp",
            "-B",
            folder,
            *settings,
            "-DCMAKE_CXX_FLAGS=-Werror",
        ),
        ("cmake", "--build", folder),
    ):
        made = subprocess.run(line, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout + made.stderr

    def run(*arguments):
        line = [folder / "qyolo_selftest", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)

    return run


@dataclass(frozen=True)
class Release:
    """A release with the keys that a device reads, and what our own decoding finds in its images."""

    path: Path
    detections: list


def rows_of(runner, tensor, conf, multi_label):
    found = decode(runner(tensor)[0], conf, IOU, MAX_DET, multi_label=multi_label)
    return np.concatenate((found.boxes, found.scores[:, None], found.classes[:, None].astype(np.float32)), 1)


def write_vector(root, number, image, session, rows):
    """The golden files of one image; a third of the places of each output."""
    golden = root / "golden" / "onnxruntime"
    golden.mkdir(parents=True, exist_ok=True)
    (root / "golden" / f"input_{number}.u8").write_bytes(image.tobytes())
    rows.astype("<f4").tofile(golden / f"input_{number}.detections.f32")
    tensor = (image.transpose(2, 0, 1)[None] / np.float32(255)).astype(np.float32)
    outputs = []
    for output, values in zip(session.get_outputs(), session.run(None, {"images": tensor}), strict=True):
        base = f"golden/onnxruntime/input_{number}.{output.name}"
        places = np.arange(number, values.size, 3)
        places.astype("<u4").tofile(root / f"{base}.indices.u32")
        values.ravel()[places].astype("<f4").tofile(root / f"{base}.values.f32")
        files = {"indices": f"{base}.indices.u32", "values": f"{base}.values.f32"}
        outputs.append({"name": output.name, "shape": list(values.shape), "count": len(places), **files})
    detections = f"golden/onnxruntime/input_{number}.detections.f32"
    return {"input": number, "outputs": outputs, "detections": detections, "detection_count": len(rows)}


@pytest.fixture(scope="module")
def make_release(tmp_path_factory, make_detector):
    """Function from an architecture, and whether its engine ends at the raw maps, to a release; not to be changed."""

    @functools.cache
    def make(kind="pico", raw=False, multi_label=True):
        root = tmp_path_factory.mktemp("release")
        view = fold_float(make_detector(kind, seed=3))
        model = export_float(view, IMGSZ, dynamic=False)
        engine = root / "engines" / "model.onnx"
        engine.parent.mkdir()
        ir.save(expose_heads(model, view) if raw else model, engine)
        images = np.random.default_rng(5).integers(0, 256, (2, IMGSZ, IMGSZ, 3), np.uint8)
        tensors = [(image.transpose(2, 0, 1)[None] / np.float32(255)).astype(np.float32) for image in images]
        scores = np.sort(np.concatenate([open_engine(engine, conf=0)(tensor)[0, 4:].ravel() for tensor in tensors]))
        conf = float(scores[-DETECTIONS : -DETECTIONS + 2].mean())  # between two scores
        runner, session = open_engine(engine, conf=conf), onnxruntime.InferenceSession(engine)
        rows = [rows_of(runner, tensor, conf, multi_label) for tensor in tensors]
        results = [write_vector(root, number, images[number], session, rows[number]) for number in (0, 1)]
        exact = {"relative_error": 0, "score": 1e-5 if raw else 0, "iou": 0.9999 if raw else 1}
        sides = {"height": IMGSZ, "width": IMGSZ}
        inputs = [{"path": f"golden/input_{number}.u8", **sides} for number in (0, 1)]
        golden = {"view": "onnxruntime", "other_machine": exact, "results": results}
        index = {"schema_version": 1, "compared": 20, "inputs": inputs, "engines": [golden]}
        (root / "golden" / "golden.json").write_text(json.dumps(index, indent=2))
        names = [NAMES[i % 3] + str(i) for i in range(runner(tensors[0]).shape[1] - 4)]
        manifest = {
            "schema_version": 1,
            "name": "tiny",
            "version": "1.0.0",
            "model": {"names": names},
            "preprocessing": {"input_name": "images", "dtype": "float32", "layout": "NCHW"},
            "postprocessing": {"conf": conf, "iou": IOU, "max_det": MAX_DET, "multi_label": multi_label},
            "engines": [{"view": "onnxruntime", "format": "onnx", "path": "engines/model.onnx"}],
        }
        (root / "manifest.json").write_text(json.dumps(manifest))
        expected = [(names[int(row[5])], row) for image in rows for row in image]
        return Release(root, expected)

    return make


@pytest.fixture
def damaged(make_release, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(make_release().path, tmp_path / "release"))


def boxes_of(process):
    return [line for line in process.stdout.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize("kind", ["pico", "yolov5"])
@pytest.mark.parametrize("raw", [False, True], ids=["decoded", "raw"])
@pytest.mark.parametrize("multi_label", [True, False], ids=["all labels", "best label"])
def test_the_device_finds_what_was_found_here(program, make_release, kind, raw, multi_label):
    release = make_release(kind, raw, multi_label)
    process = program(release.path, "onnxruntime", 0)
    assert process.returncode == 0, process.stdout + process.stderr
    found = boxes_of(process)
    assert len(found) == len(release.detections) > 5
    for line, (name, row) in zip(found, release.detections, strict=True):
        numbers = [float(word) for word in line[2 + len(name) :].split() if word[0] not in "xy"]
        assert line.startswith(f"  {name} ")
        np.testing.assert_allclose(numbers, [row[4], *row[:4]], atol=0.0502)


def test_a_real_release_passes(program, tiny_build):
    release = tiny_build.folder / "release"
    if not (release / "golden").is_dir():
        pytest.skip("the release has no golden vectors")
    process = program(release)
    assert (process.returncode, process.stderr) == (0, ""), process.stdout


@pytest.mark.parametrize("part", ["values.f32", "detections.f32", "u8"])
def test_an_engine_that_computes_something_else_fails(program, damaged, part):
    (file,) = (damaged / "golden").rglob(f"input_0*{part}")
    if part == "u8":  # as if the colours were in the other order
        file.write_bytes(np.fromfile(file, np.uint8).reshape(-1, 3)[:, ::-1].tobytes())
    else:
        (np.fromfile(file, "<f4") * np.float32(1.01)).tofile(file)
    process = program(damaged)
    assert process.returncode == 1
    assert process.stdout.splitlines()[-1].startswith("out of tolerance: relative error ")


DAMAGES = {
    "no manifest": ("manifest.json", None, "manifest.json: it cannot be read"),
    "no golden vectors": ("golden/golden.json", None, "golden.json: it cannot be read"),
    "no JSON": ("manifest.json", lambda text: text[:-9], "manifest.json: it is not valid"),
    "deep JSON": ("manifest.json", lambda text: b"[" * 100_000, "nested too deeply"),
    "newer": ("manifest.json", lambda text: text.replace(b'ema_version": 1', b'ema_version": 2'), "a schema that"),
    "a path outside": ("manifest.json", lambda text: text.replace(b"engines/model", b"../model"), "out of the release"),
    "an absolute path": (
        "golden/golden.json",
        lambda text: text.replace(b'"golden/input', b'"/golden/input'),
        "out of",
    ),
    "a short file": ("golden/input_0.u8", lambda text: text[1:], "12287 bytes, but 12288 are expected"),
    "another output": ("golden/golden.json", lambda text: text.replace(b'"output0"', b'"output1"'), "'output1'"),
    "a missing key": ("manifest.json", lambda text: text.replace(b'"iou"', b'"iuo"'), "no key 'iou'"),
    "a wrong kind": ("manifest.json", lambda text: text.replace(b'"max_det": 40', b'"max_det": "40"'), "a number"),
    "a fraction": ("manifest.json", lambda text: text.replace(b'"max_det": 40', b'"max_det": -1'), "a whole number"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_release_is_refused_in_one_sentence(program, damaged, case):
    name, change, reason = DAMAGES[case]
    file = damaged / name
    if change is None:
        file.unlink()
    else:
        before = file.read_bytes()
        file.write_bytes(change(before))
        assert file.read_bytes() != before
    process = program(damaged)
    assert process.returncode == 4
    assert process.stderr.startswith("error: ") and reason in process.stderr
    assert process.stderr.count("\n") == 1


def test_wrong_arguments_and_engines_are_told(program, damaged):
    assert program().returncode == 2
    assert program(damaged, "onnxruntime", "many").returncode == 2
    process = program(damaged, "float")
    assert (process.returncode, process.stderr) == (4, "error: the release has no ONNX engine 'float'\n")
    (damaged / "engines" / "model.onnx").write_bytes(b"no model")
    assert program(damaged).returncode == 2
