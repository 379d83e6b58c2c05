"""Golden vectors: what is written, that a device's plain reader gets the same, and what the selftest refuses."""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import onnxruntime
import pytest
from helpers.releases import ENGINE, IMGSZ, NAMES, THRESHOLDS, make_release, write_detector, write_raw_detector
from hypothesis import given
from hypothesis import strategies as st

from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.synthetic import generate
from qyolo_deploy.device.results import Difference, compare_detections, relative_error
from qyolo_deploy.device.selftest import selftest
from qyolo_deploy.engines.base import open_engine
from qyolo_deploy.engines.heads import Head
from qyolo_deploy.errors import InputError, IntegrityError
from qyolo_deploy.release.golden import Golden, GoldenEngine, read_golden
from qyolo_deploy.release.manifest import RawHead
from qyolo_deploy.release.tolerance import tolerances
from qyolo_deploy.release.verify import verify_release
from qyolo_deploy.stages.golden import Picture, Subject, choose_pictures, chosen_places, make_golden

INDEX = "golden/golden.json"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("golden"))


def change_index(change):
    """A change of the golden files' index, before it is released."""

    def apply(files):
        body = json.loads(files[INDEX])
        change(body)
        files[INDEX] = json.dumps(body).encode()

    return apply


def elsewhere(body):
    body["engines"][0]["machine"]["cpu"] = "another"


def run(folder, **options):
    return selftest(verify_release(folder), **options)


def test_a_plain_reader_finds_what_the_engine_computes(release):
    index = json.loads((release / INDEX).read_bytes())
    session = onnxruntime.InferenceSession(release / ENGINE)
    (engine,) = index["engines"]
    for result in engine["results"]:
        entry = index["inputs"][result["input"]]
        image = np.fromfile(release / entry["path"], np.uint8).reshape(entry["height"], entry["width"], 3)
        tensor = (image.astype(np.float32) / np.float32(255)).transpose(2, 0, 1)[None]
        (output,) = session.run(["output0"], {"images": np.ascontiguousarray(tensor)})
        (told,) = result["outputs"]
        assert tuple(told["shape"]) == output.shape and told["box_channels"] == 4
        indices = np.fromfile(release / told["indices"], "<u4")
        values = np.fromfile(release / told["values"], "<f4")
        assert len(indices) == len(values) == told["count"] == len(set(indices.tolist()))
        np.testing.assert_array_equal(output.reshape(-1)[indices], values)
        rows = np.fromfile(release / result["detections"], "<f4").reshape(-1, 6)
        assert len(rows) == result["detection_count"] > 0
        best = output[0, 4:].max()
        assert rows[0, 4] == best and output[0, 4 + int(rows[0, 5])].max() == best
        assert (np.diff(rows[:, 4]) <= 0).all()


def test_an_engine_that_leaves_decoding_to_its_runner_gives_its_raw_maps(tmp_path):
    runner = open_engine(write_raw_detector(tmp_path / "raw.onnx"))
    picture = Picture("noise", np.random.default_rng(0).integers(0, 256, (IMGSZ, IMGSZ, 3), np.uint8))
    files = make_golden({"onnxruntime": Subject(runner, "w8a8")}, [picture], THRESHOLDS, "generated")
    result = Golden.model_validate_json(files[INDEX]).engines[0].results[0]
    assert [(output.name, output.shape, output.box_channels) for output in result.outputs] == [
        ("head0", (1, 4, 8, 8), 0),
        ("head1", (1, len(NAMES), 8, 8), 0),
    ]
    tensor = (picture.image.astype(np.float32) / np.float32(255)).transpose(2, 0, 1)[None]
    session = onnxruntime.InferenceSession(tmp_path / "raw.onnx")
    for output in result.outputs:
        (maps,) = session.run([output.name], {"images": np.ascontiguousarray(tensor)})
        indices = np.frombuffer(files[output.indices], "<u4")
        np.testing.assert_array_equal(maps.reshape(-1)[indices], np.frombuffer(files[output.values], "<f4"))
    best = np.frombuffer(files[result.detections], "<f4").reshape(-1, 6)[0, 4]
    assert best == pytest.approx(1 / (1 + np.exp(-maps.max())), rel=1e-5)  # of the last output, the class logits


def test_of_many_cells_the_highest_are_kept_with_all_their_channels():
    output = np.random.default_rng(0).standard_normal((1, 5, 1000)).astype(np.float32)
    places = chosen_places(output, boxes=4)
    cells = np.unique(places % 1000)
    assert len(places) == 5 * len(cells) and 200 < len(cells) <= 256
    assert set(np.argsort(-output[0, 4])[:100]) <= set(cells)


def test_validation_images_are_taken_where_the_recipe_says_so(tmp_path):
    data = generate(tmp_path / "data", seed=0, train_images=1, val_images=3, imgsz=IMGSZ)
    runner = open_engine(write_detector(tmp_path / "toy.onnx"))
    pictures = choose_pictures("validation", data, IMGSZ, runner, THRESHOLDS)
    assert [picture.origin.rsplit(" ", 1)[0] for picture in pictures] == ["validation image"] * 2 + ["noise"]
    index = int(pictures[0].origin.split()[-1])
    image = read_image(tmp_path / "data" / "images" / "val" / f"{index:06d}.jpg")
    np.testing.assert_array_equal(pictures[0].image, image)  # it has the network's size already


def test_inputs_are_scenes_without_rights_and_noise(release):
    golden = read_golden(release)
    assert golden.source == "generated"
    assert [entry.origin.split()[0] for entry in golden.inputs] == ["scene", "scene", "noise"]
    noise = np.fromfile(release / golden.inputs[2].path, np.uint8)
    assert (noise.min(), noise.max(), len(noise)) == (0, 255, IMGSZ * IMGSZ * 3)


def test_all_channels_of_the_best_cells_are_kept(release):
    result = read_golden(release).engines[0].results[0]
    indices = np.fromfile(release / result.outputs[0].indices, "<u4")
    assert len(indices) == (4 + len(NAMES)) * 64  # so few cells are all kept


def test_the_same_inputs_give_the_same_release(release, tmp_path):
    again = make_release(tmp_path)
    assert (again / "manifest.json").read_bytes() == (release / "manifest.json").read_bytes()


def test_the_engine_repeats_itself_here(release):
    (check,) = run(release)
    assert (check.status, check.same_machine, check.difference) == ("ok", True, Difference())
    assert check.detections > 0


def test_another_engine_is_found_here_and_elsewhere(tmp_path):
    for name, change in (("here", None), ("elsewhere", change_index(elsewhere))):
        (check,) = run(make_release(tmp_path / name, change, seed=1))
        assert check.status == "off"
        assert "onnxruntime differs by" in check.describe()


def test_a_swapped_channel_order_is_found_elsewhere(tmp_path):
    def swap(files):
        change_index(elsewhere)(files)
        for path in [path for path in files if path.endswith(".u8")]:
            files[path] = np.frombuffer(files[path], np.uint8).reshape(-1, 3)[:, ::-1].tobytes()

    (check,) = run(make_release(tmp_path, swap))
    assert check.status == "off" and not check.same_machine


def test_last_digits_may_differ_elsewhere_but_not_here(tmp_path):
    def nudge(files):
        for path in [path for path in files if path.endswith(".values.f32")]:
            values = np.frombuffer(files[path], "<f4")
            files[path] = (values * np.float32(1.00001)).tobytes()

    def both(files):
        nudge(files)
        change_index(elsewhere)(files)

    assert run(make_release(tmp_path / "here", nudge))[0].status == "off"
    assert run(make_release(tmp_path / "elsewhere", both))[0].status == "ok"


def test_the_command_runs_without_torch_and_its_exit_code_tells(release, tmp_path):
    code = (
        "import sys, os; from qyolo_deploy.cli import main; sys.argv[0] = 'qyolo'\n"
        "try:\n    main()\n"
        "finally:\n    print({'torch', 'onnx', 'ultralytics', 'jinja2'} & set(sys.modules), file=sys.stderr)"
    )

    def command(folder):
        line = [sys.executable, "-c", code, "selftest", str(folder), "--engine", "onnxruntime", "--json"]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    good, bad = command(release), command(make_release(tmp_path, seed=1))
    assert (good.returncode, bad.returncode) == (0, 1)
    assert good.stderr.endswith("set()\n") and bad.stderr.endswith("set()\n")
    told = [json.loads(run.stdout.splitlines()[-1])["engines"][0]["status"] for run in (good, bad)]
    assert told == ["ok", "off"]


def test_an_unknown_engine_is_refused_with_those_that_there_are(release):
    with pytest.raises(InputError, match="--engine tensorrt: expected one of onnxruntime"):
        run(release, engine="tensorrt")


def change_file(suffix, content):
    def apply(files):
        path = next(path for path in sorted(files) if path.endswith(suffix))
        files[path] = content(files[path])

    return apply


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda files: files.pop(INDEX), r"has no golden/golden\.json"),
        (lambda files: files.update({INDEX: b"{"}), "is not JSON"),
        (lambda files: files.update({INDEX: b"[" * 100_000}), "is not JSON"),
        (change_index(lambda body: body.update(schema_version=2)), "schema_version"),
        (change_index(lambda body: body["inputs"][0].update(path="../x")), "leaves its folder"),
        (change_index(lambda body: body["inputs"][0].update(width=7)), r"input_0\.u8 has 12288 bytes"),
        (change_index(lambda body: body["engines"][0].update(view="other")), "an engine 'other'"),
        (change_index(lambda body: body["engines"][0]["results"][0].update(input=9)), "an input 9"),
        (change_index(lambda body: body["engines"][0]["results"][0]["outputs"][0].update(name="x")), "no such output"),
        (change_index(lambda body: body["engines"][0]["results"][0].update(detection_count=1000)), "are expected"),
        (change_file(".values.f32", lambda data: data[:-1]), r"values\.f32 has \d+ bytes"),
        (change_file(".indices.u32", lambda data: data[:-4] + b"\xff" * 4), "a place outside the output"),
    ],
)
def test_golden_files_that_are_not_what_they_say(tmp_path, change, match):
    folder = make_release(tmp_path, change)
    with pytest.raises(IntegrityError, match=match) as caught:
        run(folder)
    assert "\n" not in str(caught.value)


# --- comparisons --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(release):
    return read_golden(release)


def rows(*detections):
    return np.array(detections, np.float32).reshape(-1, 6)


A, B = (0, 0, 10, 10, 0.9, 0), (50, 50, 60, 60, 0.8, 1)


def test_order_does_not_matter_and_weak_detections_do_not_count(golden):
    weak = (80, 80, 90, 90, 0.01, 0)
    assert compare_detections(rows(B, A), rows(A, B, weak), golden) == Difference()


def test_iou_and_score_of_the_partner_are_told(golden):
    moved = (0, 0, 10, 5, 0.7, 0)
    found = compare_detections(rows(moved), rows(A), golden)
    assert found.iou == pytest.approx(0.5)
    assert found.score == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize(("found", "expected"), [((A,), (A, B)), ((A, B), (A,)), ((), (A,)), ((A,), ())])
def test_a_detection_without_a_partner_is_the_worst_there_is(golden, found, expected):
    difference = compare_detections(rows(*found), rows(*expected), golden)
    assert (difference.score, difference.iou) == (1.0, 0.0)


def test_another_class_is_no_partner(golden):
    assert compare_detections(rows((*A[:5], 1)), rows(A), golden).iou == 0


def test_what_is_not_finite_is_infinitely_far():
    assert relative_error(np.array([np.nan], np.float32), np.ones(1, np.float32)) == np.inf
    assert relative_error(np.zeros(0, np.float32), np.zeros(0, np.float32)) == 0


@given(st.floats(0.0, 10.0), st.integers(1, 50))
def test_relative_error_is_the_share_of_the_norm(share, count):
    values = np.arange(1, count + 1, dtype=np.float32)
    assert relative_error(values * np.float32(1 + share), values) == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("scheme", ["fp32", "w8a8", "w4a8", "w4a4", "w3a4"])
def test_tolerances_are_exact_here_and_told_elsewhere(scheme):
    same, other, reason = tolerances(scheme)
    assert (same.relative_error, same.score, same.iou) == (0, 0, 1)
    assert other.relative_error > 0 and other.iou < 1 and "exactly" in reason


def test_fewer_bits_of_activations_leave_more_room():
    room = [tolerances(scheme)[1].relative_error for scheme in ("fp32", "w4a8", "w4a4")]
    assert room == sorted(room) and len(set(room)) == 3


def test_the_index_reads_back_what_was_written(golden):
    assert Golden.model_validate_json(golden.to_text()) == golden
    assert isinstance(golden.engines[0], GoldenEngine)


@pytest.mark.parametrize("head", [Head((8, 16), bins=16), Head((8,), anchors=(((10.0, 13.0), (16.0, 30.0)),))])
def test_the_manifest_tells_how_raw_maps_are_decoded(head):
    told = RawHead(**asdict(head)).model_dump_json()
    assert Head.parse(told) == head
