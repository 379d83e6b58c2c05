"""`qyolo bench engines`: turns and ratios, what it refuses, what its table and JSON tell. Nothing asserts a time."""

import importlib.util
import sys
from statistics import median

import onnx_ir as ir
import onnxruntime
import pytest
from helpers.releases import write_detector
from hypothesis import given
from hypothesis import strategies as st

from qyolo_deploy.engines import tensorrt as tensorrt_module
from qyolo_deploy.engines.onnxruntime import OnnxRuntimeRunner
from qyolo_deploy.engines.openvino import build_openvino
from qyolo_deploy.engines.tensorrt_file import BuildRecord, write_engine
from qyolo_deploy.errors import InputError, QyoloError
from qyolo_deploy.recipe_file import load_recipe
from qyolo_deploy.stages import bench_engines_peers as peers_module
from qyolo_deploy.stages.bench_engines import bench_table, caption, profile_table, run_bench
from qyolo_deploy.stages.bench_engines_own import own_subjects, parse_schemes, write_recipe
from qyolo_deploy.stages.bench_engines_peers import PEERS, FloatModel, Peer, peer_subjects, refusal
from qyolo_deploy.stages.bench_engines_subjects import BenchEnginesSettings, Subject, find_baseline, parse_engines
from qyolo_deploy.stages.bench_engines_turns import summarize, take_turns

FAST = ("--imgsz", 64, "--rounds", 2, "--runs", 3, "--threads", 1)
MS = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory, static_model, float_model):
    """Two ONNX engines, one of them for 64 x 64 px alone, and an OpenVINO folder."""
    folder = tmp_path_factory.mktemp("engines")
    ir.save(static_model, folder / "fixed.onnx")
    ir.save(float_model, folder / "open.onnx")
    (folder / "net_openvino_model").mkdir()
    build_openvino(folder / "open.onnx", folder / "net_openvino_model", "net", {})
    return folder


@pytest.fixture(scope="module")
def measured(qyolo, folder):
    outcome = qyolo("bench", "engines", "open.onnx", "fixed.onnx", *FAST, "--json", cwd=folder)
    assert outcome.code == 0, outcome.stderr
    return outcome


# --- turns and ratios ---------------------------------------------------------------------------------------


def test_every_second_round_goes_backwards_and_the_first_of_each_turn_does_not_count():
    now, calls, ticks = 0, [], []

    def engine(name, elapsed):
        def run():
            nonlocal now
            calls.append(name)
            now += (elapsed + len(calls)) * MS

        return run

    times = take_turns([engine("a", 0), engine("b", 100)], 3, 2, lambda *state: ticks.append(state), lambda: now)
    turns = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert turns == ["bbb", "aaa", "aaa", "bbb", "bbb", "aaa", "aaa", "bbb"]  # the first two warm up
    assert times == [[[8, 9], [17, 18], [20, 21]], [[111, 112], [114, 115], [123, 124]]]
    assert ticks == [(index + 1, 8, "ab".index(turn[0])) for index, turn in enumerate(turns)]


LATENCIES = st.floats(0.1, 1000)
ROUNDS = st.integers(1, 5).flatmap(
    lambda runs: st.lists(
        st.tuples(*[st.lists(LATENCIES, min_size=runs, max_size=runs)] * 2, LATENCIES), min_size=1, max_size=7
    )
)


@given(ROUNDS)
def test_ratios_are_of_the_same_round_so_that_its_mood_cancels(rounds):
    own, other = [mine for mine, _, _ in rounds], [theirs for _, theirs, _ in rounds]
    row = summarize(own, other)
    expected = [median(mine) / median(theirs) for mine, theirs in zip(own, other, strict=True)]
    assert row["ratio"] == {"median": median(expected), "min": min(expected), "max": max(expected)}
    assert row["round_ms"] == [median(mine) for mine in own]
    every = sorted(ms for mine in own for ms in mine)
    assert every[0] <= row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= every[-1]
    assert row["p50_ms"] == pytest.approx(median(every))
    moods = [mood for _, _, mood in rounds]
    slower = ([[ms * mood for ms in turn] for turn, mood in zip(times, moods, strict=True)] for times in (own, other))
    assert summarize(*slower)["ratio"] == pytest.approx(row["ratio"])
    assert summarize(own, own)["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}


# --- what the command is given ------------------------------------------------------------------------------


def labels(subjects):
    return [subject.label for subject in subjects]


def test_openvino_takes_a_row_for_each_hint(folder, monkeypatch):
    monkeypatch.chdir(folder)
    net = "net_openvino_model"
    assert labels(parse_engines([net, "open.onnx"], ["f32", "bf16"])) == [f"{net}@f32", f"{net}@bf16", "open.onnx"]
    assert labels(parse_engines([f"{net}@bf16", net], ["f32"])) == [f"{net}@bf16", f"{net}@f32"]


def test_engines_of_one_name_are_told_apart_by_their_paths(folder, tmp_path):
    twin = tmp_path / "open.onnx"
    twin.write_bytes((folder / "open.onnx").read_bytes())
    found = parse_engines([str(twin), str(folder / "open.onnx"), str(folder / "fixed.onnx")], ["f32"])
    assert labels(found) == [str(twin), str(folder / "open.onnx"), "fixed.onnx"]


def test_a_baseline_is_a_row_or_becomes_the_first(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rows = parse_engines(["open.onnx", "net_openvino_model"], ["f32", "bf16"])
    assert find_baseline(rows, None) == 0
    assert find_baseline(rows, "net_openvino_model") == 1
    assert find_baseline(rows, "net_openvino_model@bf16") == 2
    assert labels(parse_engines(["open.onnx"], ["f32"], "fixed.onnx")) == ["fixed.onnx", "open.onnx"]
    assert labels(parse_engines(["open.onnx"], ["f32"], "open.onnx")) == ["open.onnx"]
    assert labels(parse_engines(["open.onnx"], ["f32"], "nncf-mixed")) == ["open.onnx"]  # a row that is yet to come


def test_a_baseline_without_an_engine_is_refused_with_its_reason():
    rows = [Subject("nncf-mixed", None, "openvino", note="needs nncf")]
    for text, sentence in ((None, "no engine to measure"), ("nncf-mixed", "needs nncf"), ("x", "one of nncf-mixed")):
        with pytest.raises(InputError, match=sentence):
            find_baseline(rows, text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "there is no engine to measure"),
        (("absent.onnx",), "absent.onnx: no such engine"),
        (("absent@bf16",), "absent@bf16: no such engine"),
        (("open.onnx", "open.onnx"), "open.onnx: is listed 2 times with the same precision hint"),
        (("open.onnx@bf16",), "open.onnx@bf16: only OpenVINO takes a precision hint"),
        (("net_openvino_model@int3",), "precision hint 'int3': expected one of f32, bf16, f16"),
        (("open.onnx", "--precision-hint", "f64"), "precision hint 'f64': expected one of f32, bf16, f16"),
        (("open.onnx", "--baseline", "other.onnx"), "--baseline other.onnx: expected one of open.onnx"),
        (("open.onnx", "--imgsz", 65), "imgsz is 65, expected a multiple of 32"),
        (("open.onnx", "--rounds", 1), "rounds is 1, expected at least 2"),
        (("open.onnx", "--conf", 2), "conf is 2.0, expected 0 to 1"),
        (("open.onnx", "--peers"), "--peers and --schemes need --weights and --data"),
        (("open.onnx", "--schemes", "w9a8"), "scheme 'w9a8': expected w<bits>a<bits> with 2 to 8 bits, such as w4a8"),
        (("fixed.onnx", "--imgsz", 96), "fixed.onnx: its input is fixed to 64 x 64 px, but imgsz is 96"),
    ],
)
def test_the_command_refuses_bad_arguments(qyolo, folder, arguments, sentence):
    outcome = qyolo("bench", "engines", *arguments, "--json", cwd=folder)
    assert outcome.code == 2
    assert outcome.json["error"] == sentence
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"runs": 0}, "runs is 0, expected at least 1"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(change, sentence):
    with pytest.raises(InputError, match=sentence):
        BenchEnginesSettings(**change)


# --- table and JSON -----------------------------------------------------------------------------------------


def test_json_has_all_that_was_measured(measured, folder):
    result = measured.json
    assert {key: result[key] for key in ("imgsz", "rounds", "runs", "threads", "baseline")} == {
        "imgsz": 64,
        "rounds": 2,
        "runs": 3,
        "threads": 1,
        "baseline": "open.onnx",
    }
    assert result["environment"]["onnxruntime"] == onnxruntime.__version__
    assert {"cpu", "platform", "qyolo_deploy"} <= set(result["environment"])
    assert [row["name"] for row in result["rows"]] == ["open.onnx", "fixed.onnx"]
    baseline = result["rows"][0]
    for row in result["rows"]:
        ratios = [own / other for own, other in zip(row["round_ms"], baseline["round_ms"], strict=True)]
        assert len(ratios) == 2
        assert row["ratio"] == {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
        assert row["files"] == {"onnx": (folder / row["name"]).stat().st_size}
        assert row["size_bytes"] == row["files"]["onnx"]
        assert row["load_ms"] > 0 and row["parallel"] == 1 and "peak_bytes" not in row
        assert row["images_per_s"] == pytest.approx(1000 / row["p50_ms"])
    assert [row["fixed_input"] for row in result["rows"]] == [False, True]


def test_the_table_tells_the_same_and_the_caption_where(measured):
    head, rows = bench_table(measured.json)
    for text in (*head, *rows[0], "64 px, 2 rounds of 3 inferences, threads: 1;", "cores, load"):
        assert text in measured.stdout
    assert rows[0][4:6] == ["1.00", "1.00..1.00"]


def test_openvino_rows_have_the_sizes_of_both_files(folder):
    path = folder / "net_openvino_model"
    settings = BenchEnginesSettings(64, 2, 1)
    result = run_bench(parse_engines([str(path), str(path / "net.xml")], ["f32"]), settings)
    sizes = {kind: (path / f"net.{kind}").stat().st_size for kind in ("bin", "xml")}
    for row in result["rows"]:
        assert row["files"] == sizes and row["precision_hint"] == "f32"
    megabytes = " + ".join(f"{sizes[kind] / 1e6:.2f}" for kind in ("bin", "xml"))
    assert bench_table(result)[1][0][10] == megabytes
    assert "threads: the runtimes' choice" in caption(result)


def test_a_peer_that_cannot_be_opened_keeps_its_row(folder, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    subjects = [
        Subject("broken", broken, "onnxruntime", required=False),
        Subject("open", folder / "open.onnx", "onnxruntime"),
    ]
    result = run_bench(subjects, BenchEnginesSettings(64, 2, 1))
    assert result["baseline"] == "open"
    assert "cannot load it" in result["rows"][0]["note"] and "ratio" not in result["rows"][0]
    head, rows = bench_table(result)
    assert rows[0][3:11] == ["-"] * 8 and len(rows[0]) == len(head)


@pytest.fixture
def toy(tmp_path):
    return write_detector(tmp_path / "toy.onnx")


@pytest.fixture
def plan(toy, tmp_path):
    """A TensorRT engine of another device, whose plan is the graph itself."""
    record = BuildRecord(
        flavor="tensorrt",
        tensorrt="10.3.0",
        gpu="Orin",
        compute_capability="8.7",
        driver="CUDA 12.6",
        onnx_sha256="a" * 64,
        weights_bytes=1000,
        hardware_compatibility="none",
        version_compatible=False,
    )
    return write_engine(tmp_path, "net", toy.read_bytes(), {}, record)[0]


def test_an_engine_of_tensorrt_that_cannot_run_here_has_a_note_and_no_number(toy, plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    subjects = parse_engines([str(toy), str(plan), str(plan.with_suffix(".plan"))], ["f32"])
    assert [(subject.runtime, subject.hint) for subject in subjects] == [
        ("onnxruntime", None),
        *2 * [("tensorrt", None)],
    ]
    result = run_bench(subjects, BenchEnginesSettings(64, rounds=2, runs=1, threads=1))
    for row in result["rows"][1:]:
        assert set(row) == {"name", "path", "runtime", "precision_hint", "note"}
        assert row["note"] == "TensorRT is not installed"
    _, rows = bench_table(result)
    assert [row[:2] + row[-1:] for row in rows[1:]] == [
        ["net.engine", "tensorrt", "TensorRT is not installed"],
        ["net.plan", "tensorrt", "TensorRT is not installed"],
    ]
    assert set(rows[1][3:-1]) == {"-"}
    with pytest.raises(InputError, match=r"no engine to measure \(TensorRT is not installed\)"):
        run_bench(subjects[1:], BenchEnginesSettings(64, rounds=2, runs=1))
    with pytest.raises(InputError, match="only OpenVINO takes a precision hint"):
        parse_engines([f"{plan}@f16"], ["f32"])


def test_where_it_runs_it_takes_its_turns(toy, plan, monkeypatch):
    class StandIn(OnnxRuntimeRunner):
        def __init__(self, path, conf):
            super().__init__(toy, conf)
            self.path, self.runtime = path, "tensorrt"

    monkeypatch.setattr(tensorrt_module, "TensorRtRunner", StandIn)
    subjects = parse_engines([str(toy), str(plan)], ["f32"])
    result = run_bench(subjects, BenchEnginesSettings(64, rounds=2, runs=1, threads=1))
    row = result["rows"][1]
    assert len(row["round_ms"]) == 2 and row["note"] == ""
    assert row["files"] == {"engine": plan.stat().st_size} and row["size_bytes"] == plan.stat().st_size
    assert f"{plan.stat().st_size / 1e6:.2f}" in bench_table(result)[1][1]


def test_throughput_of_batches_and_peak_memory(folder):
    engines = [str(folder / "open.onnx"), str(folder / "net_openvino_model")]
    settings = BenchEnginesSettings(64, 2, 1, threads=2, batch=3, mode="throughput", memory=True)
    result = run_bench(parse_engines(engines, ["f32"]), settings)
    assert (result["mode"], result["batch"]) == ("throughput", 3)
    widest = max(row["parallel"] for row in result["rows"])
    assert result["rows"][0]["parallel"] == 2
    assert result["images_per_call"] % (3 * widest) == 0 and result["images_per_call"] > 3
    for row in result["rows"]:
        assert row["images_per_s"] == pytest.approx(result["images_per_call"] / row["p50_ms"] * 1000)
        assert 0 < row["engine_bytes"] < row["peak_bytes"] < 2e9
    head, rows = bench_table(result)
    assert head[-2] == "peak MB" and {len(row) for row in rows} == {len(head)}
    assert f"times {result['images_per_call']} images" in caption(result)


def test_an_engine_of_one_image_refuses_a_batch(folder):
    with pytest.raises(InputError, match=r"cannot run on images of shape \(2, 3, 64, 64\)"):
        run_bench([Subject("fixed", folder / "fixed.onnx", "onnxruntime")], BenchEnginesSettings(64, 2, 1, batch=2))


def test_the_profile_tells_what_runs(tiny_build):
    subjects = [
        Subject("ours", tiny_build.openvino, "openvino", "f32"),
        Subject("onnx", tiny_build.onnx, "onnxruntime"),
        Subject("absent", None, "openvino", required=False),
    ]
    head, rows = profile_table(subjects, BenchEnginesSettings(128, 2, 2))
    assert head[0] == "engine" and {row[0] for row in rows} == {"ours@f32", "onnx"}
    for kind in ("Convolution", "QLinearConv"):
        (convolutions,) = [row for row in rows if row[1] == kind]
        assert convolutions[2] == "u8" and int(convolutions[3]) > 20 and float(convolutions[4]) > 0
    images = [row for row in rows if row[1] == "QuantizeLinear"]
    assert [row[:4] for row in images] == [["onnx", "QuantizeLinear", "u8", "1"]]


# --- what is made of float weights --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    from qyolo_deploy.data.synthetic import generate

    return generate(tmp_path_factory.mktemp("scenes") / "data", seed=0, train_images=4, val_images=2, imgsz=64)


@pytest.fixture
def float_weights(scenes, tmp_path):
    return FloatModel("builtin:quickstart", str(scenes), 64, 3, tmp_path)


def test_a_missing_package_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else object())
    notes = {peer.name: refusal(peer, "ultralytics") for peer in PEERS}
    for name in ("nncf-performance", "nncf-mixed", "ultralytics-int8-openvino"):
        assert notes.pop(name) == 'needs nncf: pip install "qyolo_deploy[build,bench]"'
    assert set(notes.values()) == {""}


def test_ultralytics_has_no_anchor_models():
    refused = [peer.name for peer in PEERS if "does not apply" in refusal(peer, "yolov5")]
    assert refused == ["ultralytics-int8-onnx", "ultralytics-int8-openvino"]


@pytest.mark.slow
def test_peers_are_made_once_and_failures_are_rows(float_weights, monkeypatch):
    chosen = (Peer("ort-quantize-static", "onnxruntime", (), "why"), Peer("no-such", "openvino"))
    monkeypatch.setattr(peers_module, "PEERS", chosen)
    made, failed = peer_subjects(float_weights, ["f32"])
    assert made.path.name == "quickstart_quantize_static.onnx" and made.note == "why" and not made.required
    assert failed.path is None and "AttributeError" in failed.note
    run_bench([made, failed], BenchEnginesSettings(64, 2, 1))

    def refuse(*_):
        raise QyoloError("not again")

    monkeypatch.setattr(peers_module, "_in_process", refuse)
    again, failed = peer_subjects(float_weights, ["f32"])
    assert again == made and failed.note == "not again."


def test_other_images_or_sizes_make_other_engines(scenes, float_weights, tmp_path):
    others = [
        FloatModel("builtin:quickstart", str(scenes), 64, 2, tmp_path),
        FloatModel("yolov8n", str(scenes), 64, 3, tmp_path),
    ]
    assert len({str(model._inputs) for model in (float_weights, *others)}) == 3


def test_own_schemes_are_recipes_without_training(scenes, tmp_path):
    assert parse_schemes("w8a8, w4a4,w8a8") == ["w8a8", "w4a4"]
    recipe = load_recipe(write_recipe(tmp_path, "w4a8", tmp_path / "yolo.pt", scenes, 320, 16))
    assert recipe.quantization.scheme().label.startswith("w4a8")
    assert (recipe.train.epochs, recipe.correct.enabled, recipe.quantization.start) == (0, False, "ranges")
    assert (recipe.model.imgsz, recipe.data.calibration_images, recipe.export.storage) == (320, 16, "int4")


def test_own_engines_are_found_without_the_float_one(tmp_path):
    for path in ("onnxruntime/yolo_fp32.onnx", "onnxruntime/yolo_w4a8.onnx", "openvino/yolo_w4a8_openvino_model/a.xml"):
        (tmp_path / "engines" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "engines" / path).touch()
    assert labels(own_subjects(tmp_path, "w4a8", ["f32", "bf16"])) == [
        "w4a8-onnx",
        "w4a8-openvino@f32",
        "w4a8-openvino@bf16",
    ]


@pytest.mark.slow
def test_a_scheme_is_built_and_measured(qyolo, scenes, tmp_path):
    outcome = qyolo(
        *("bench", "engines", "--schemes", "w4a4", "--weights", "builtin:quickstart", "--data", scenes, *FAST),
        *("--calibration-images", 2, "--out", tmp_path, "--baseline", "w4a4-openvino", "--json", "--quiet"),
    )
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.count("\n") == 1 and outcome.stderr == ""
    assert outcome.json["baseline"] == "w4a4-openvino@f32"
    assert [row["name"] for row in outcome.json["rows"]] == ["w4a4-onnx", "w4a4-openvino"]
    assert all(len(row["round_ms"]) == 2 for row in outcome.json["rows"])
