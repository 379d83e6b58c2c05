import fcntl
import json
import shutil
import subprocess
import sys

import cv2
import jsonschema
import numpy as np
import pytest
import yaml

from qyolo_deploy import pipeline
from qyolo_deploy.artifact import Artifact, DigestCache, sha256_file
from qyolo_deploy.console import Reporter
from qyolo_deploy.data.synthetic import generate
from qyolo_deploy.errors import InputError
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.recipe_file import load_recipe
from qyolo_deploy.release.verify import verify_release
from qyolo_deploy.stages.plan import Plan
from qyolo_deploy.validate.run import digest_engine

ALL = ("data", "float", "train", "correct", "export", "validate", "release")
# Calibration searches a range for each tensor; where integers do not matter, the weights of one layer will do.
FIRST_LAYER = "quantization.keep_float=['model.[1-9]*']"
METRICS = ("map50_95", "map50", "map75", "map_small", "map_medium", "map_large")


def rebuild(tiny, *settings, **options):
    return pipeline.build(tiny.recipe, (*tiny.settings, *settings), out=tiny.out, **options)


def content_of(folder):
    """sha256 of every file that stages write."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    shown = {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.parts)}
    return {name.as_posix(): sha256_file(path) for name, path in shown.items()}


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- keys ---------------------------------------------------------------------------------------------------


PLAIN = {"name": "plain", "model": {"weights": "builtin:quickstart", "imgsz": 32}, "data": {"source": "synthetic"}}


@pytest.fixture
def keys(tmp_path):
    """Function from settings to the key of every stage, as if all that goes before it had stayed the same."""
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(PLAIN))

    def keys(*settings):
        plan = Plan(load_recipe(path, settings), path, None)
        build = pipeline._Build(plan, tmp_path, Reporter(quiet=True), DigestCache(tmp_path / "digests.json"))
        return {stage.name: build._key(stage, plan.inputs(stage.name, sha256_file)) for stage in pipeline.STAGES}

    return keys


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        ("data.synthetic.seed=1", {"data", "train"}),
        ("data.calibration_images=9", {"data", "train"}),
        ("model.imgsz=64", {"data", "float", "train", "correct", "export", "validate"}),
        ("float.epochs=1", {"float"}),
        ("quantization.weights.bits=5", {"train", "correct"}),
        ("train.lr=0.1", {"train"}),
        ("correct.enabled=false", {"correct", "validate"}),  # which may look at what was corrected
        ("export.storage=int4", {"export", "validate"}),
        ("validate.iou=0.7", {"validate"}),
        ("gates=[{view: float, metric: map50, op: '>=', bound: 0}]", {"validate"}),
        ("release.version=2.0.0", {"export", "validate", "release"}),
        ("name=other", {"export", "validate", "release"}),
    ],
)
def test_a_section_decides_its_own_stages(setting, stages, keys):
    before, after = keys(), keys(setting)
    assert {name for name in ALL if before[name] != after[name]} == stages


def test_checkpoint_and_architecture_decide_the_float_stage(keys, tmp_path, repository):
    architecture = tmp_path / "net.yaml"
    shutil.copy(repository / "recipes" / "architectures" / "yolov8-pico.yaml", architecture)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"one")
    settings = (f"model.weights={weights}", f"model.architecture={architecture}")
    first = keys(*settings)
    weights.write_bytes(b"two")
    second = keys(*settings)
    architecture.write_text(f"# changed\n{architecture.read_text()}")
    third = keys(*settings)
    assert len({first["float"], second["float"], third["float"]}) == 3
    assert {name for name in ALL if first[name] != third[name]} == {"float"}


# --- what runs again ----------------------------------------------------------------------------------------


def test_a_second_build_runs_nothing_and_does_not_import_torch(tiny_copy, qyolo):
    before = content_of(tiny_copy.folder)
    code = (
        "import json, sys; from qyolo_deploy import build; result = build(sys.argv[1], sys.argv[3:], out=sys.argv[2]);"
        "heavy = {'torch', 'ultralytics', 'onnx', 'onnx_ir', 'openvino', 'onnxruntime'} & set(sys.modules);"
        "print(json.dumps([result.ran, result.up_to_date, sorted(heavy)]))"
    )
    command = [sys.executable, "-c", code, str(tiny_copy.recipe), str(tiny_copy.out), *tiny_copy.settings]
    process = subprocess.run(command, env=qyolo.environment(), capture_output=True, text=True, check=True)
    assert json.loads(process.stdout) == [[], list(ALL), []]
    assert content_of(tiny_copy.folder) == before


@pytest.mark.slow
def test_gates_compare_with_the_last_release_at_a_confidence(tiny_copy, tmp_path):
    last = tmp_path / "last"
    last.mkdir()
    views = tiny_copy.report["views"]
    (last / "report.json").write_text(json.dumps({"views": views}))
    gate = {"view": "onnxruntime", "metric": "map50_95", "op": ">=", "bound": 0, "relative_to": "release"}
    sure = {**gate, "bound": -1, "relative_to": "float", "confidence": 0.9}
    settings = (f"validate.last_release={last}", f"gates={json.dumps([gate, sure])}")
    result = rebuild(tiny_copy, *settings)
    assert result.ran == ("validate", "release") and result.passed
    found = {view["name"]: view for view in result.views}
    assert result.gates[0]["reference"] == found["onnxruntime"]["map50_95"]  # the same build, measured again
    interval = found["onnxruntime"]["interval"]
    assert interval["low"] <= result.gates[1]["at_confidence"] <= interval["high"]
    assert interval["difference"] == pytest.approx(found["onnxruntime"]["map50_95"] - found["float"]["map50_95"])
    assert found["float"]["interval"] is None
    assert rebuild(tiny_copy, *settings).ran == ()
    for view in views:
        view["map50_95"] += 0.25
    (last / "report.json").write_text(json.dumps({"views": views}))
    result = rebuild(tiny_copy, *settings)
    assert result.ran == ("validate",) and not result.passed
    assert result.gates[0]["missed_by"] == pytest.approx(0.25)


@pytest.mark.parametrize("named", ["release", "release/report.json"])
def test_a_build_is_not_compared_with_the_release_that_it_replaces(named, tiny_copy):
    before = content_of(tiny_copy.folder)
    with pytest.raises(InputError, match="this build's own release, which it replaces, expected one that is kept else"):
        rebuild(tiny_copy, f"validate.last_release={tiny_copy.folder / named}")
    assert content_of(tiny_copy.folder) == before


@pytest.mark.slow
def test_a_changed_section_reruns_what_it_decides_and_no_more(tiny_copy):
    result = rebuild(tiny_copy, "validate.latency_runs=2")
    assert result.ran == ("validate", "release")
    assert result.up_to_date == ALL[:5]
    result = rebuild(tiny_copy, "validate.latency_runs=2", "correct.lr=0.002", until="correct")
    assert result.ran == ("correct",)
    assert result.views == ()
    result = rebuild(tiny_copy, "data.synthetic.seed=1", until="float")
    assert result.ran == ("data", "float")


@pytest.mark.slow
def test_lost_and_altered_files_are_made_again_as_they_were(tiny_copy, qyolo):
    folder = tiny_copy.folder
    before = content_of(folder)
    for path in ("data/images/val/000003.jpg", "train/model.safetensors", "release/recipe.resolved.yaml"):
        flip_byte(folder / path)
    (folder / "float" / "model.safetensors").unlink()
    (tiny_copy.openvino / "quickstart_w4a8.bin").unlink()
    outcome = qyolo(*tiny_copy.arguments(), "--out", tiny_copy.out, "--json")
    # What is made again is the same to the last bit, so that what depends on it stays as it is.
    assert outcome.json["ran"] == ["data", "float", "train", "export", "release"]
    assert outcome.json["up_to_date"] == ["correct", "validate"]
    after = content_of(folder)
    differing = {path for path in before if after.get(path) != before[path]}
    assert differing <= {"train/history.json", "train/checkpoint.safetensors", "events.jsonl", "release/manifest.json"}
    assert after.keys() == before.keys()


def test_damaged_records_count_as_absent(tiny_copy):
    (tiny_copy.folder / ".stages" / "release.json").write_text("[]")
    assert rebuild(tiny_copy).ran == ("release",)
    (tiny_copy.folder / ".stages" / "release.json").write_text('{"kind": ')
    assert rebuild(tiny_copy).ran == ("release",)


def test_force_runs_a_stage_from_its_beginning(tiny_copy):
    short = (FIRST_LAYER, "train.epochs=1")
    assert rebuild(tiny_copy, *short, until="train").ran == ("train",)
    checkpoint, history = (tiny_copy.folder / "train" / name for name in ("checkpoint.safetensors", "history.json"))
    weights = sha256_file(tiny_copy.folder / "train" / "model.safetensors")
    # With the checkpoint of all its epochs, there would be nothing left to train.
    before = checkpoint.stat().st_ino, json.loads(history.read_text())
    assert rebuild(tiny_copy, *short, force="train", until="train").ran == ("train",)
    after = checkpoint.stat().st_ino, json.loads(history.read_text())
    assert after[0] != before[0]
    assert [entry["epoch"] for entry in after[1]] == [entry["epoch"] for entry in before[1]] == [1]
    assert [entry["seconds"] for entry in after[1]] != [entry["seconds"] for entry in before[1]]
    assert sha256_file(tiny_copy.folder / "train" / "model.safetensors") == weights


def test_until_stops_behind_a_stage(tiny_settings, repository, tmp_path, monkeypatch):
    """Here under the default of `out`, a path that is relative."""
    monkeypatch.chdir(tmp_path)
    recipe = repository / "recipes" / "quickstart.yaml"
    result = pipeline.build(recipe, tiny_settings, until="data")
    assert result.ran == ("data",)
    assert (result.views, result.gates, result.passed) == ((), (), True)
    assert not (tmp_path / "runs" / "quickstart" / "float").exists()
    assert pipeline.build(recipe, tiny_settings, until="float").ran == ("float",)
    assert pipeline.build(recipe, tiny_settings, out=tmp_path / "runs", until="float").ran == ()


@pytest.mark.parametrize("argument", ["until", "force"])
def test_stages_that_do_not_exist_are_refused(argument, tmp_path, repository):
    with pytest.raises(InputError, match=f"^--{argument} fly: expected one of data, float, train, correct, export"):
        pipeline.build(repository / "recipes" / "quickstart.yaml", out=tmp_path / "out", **{argument: "fly"})
    assert not (tmp_path / "out").exists()


# --- one build at a time, and what a killed one leaves ------------------------------------------------------


def test_a_second_build_in_the_same_folder_is_refused(tiny_build):
    before = content_of(tiny_build.folder)
    with (tiny_build.folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"quickstart: another build is running there$"):
            rebuild(tiny_build)
    assert content_of(tiny_build.folder) == before
    assert rebuild(tiny_build).ran == ()


def test_leftovers_of_killed_writers_are_swept_away(tiny_copy):
    folder = tiny_copy.folder
    files = [".report.0a1b2c3d4e5f.partial.json", "engines/onnxruntime/.x.0a1b2c3d4e5f.partial.onnx"]
    files += [".release.0a1b2c3d4e5f.partial/engines/.y.00.partial.onnx", ".data.partial/images/val/000000.jpg"]
    files += ["float/.model.safetensors.123.tmp"]
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"half")
    before = content_of(folder)
    assert rebuild(tiny_copy).ran == ()
    assert not any((folder / path).exists() for path in files)
    assert not [path for path in folder.rglob("*") if ".partial" in path.name or path.suffix == ".tmp"]
    assert {path: digest for path, digest in before.items() if path not in files} == content_of(folder)


def test_scenes_whose_replacement_was_killed_are_drawn_again(tiny_copy):
    """Between moving the old scenes aside and drawing the new ones, there are none."""
    (tiny_copy.folder / "data").rename(tiny_copy.folder / ".data.old.partial")
    before = content_of(tiny_copy.folder / ".data.old.partial")
    assert rebuild(tiny_copy, until="data").ran == ("data",)
    assert content_of(tiny_copy.folder / "data") == before
    assert not (tiny_copy.folder / ".data.old.partial").exists()


# --- data ---------------------------------------------------------------------------------------------------

SHORT = ("model.imgsz=64", "data.calibration_images=2", "train.epochs=0", FIRST_LAYER)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    generate(root, seed=3, train_images=2, val_images=2, imgsz=64)
    return root


def repaint(image):
    cv2.imwrite(str(image), np.full((64, 64, 3), 99, np.uint8))


def test_data_option_replaces_the_recipes_data_and_its_content_decides_training(scenes, repository, tmp_path):
    recipe, data = repository / "recipes" / "quickstart.yaml", shutil.copytree(scenes, tmp_path / "mine")

    def until_train(source):
        return pipeline.build(recipe, SHORT, data=source, out=tmp_path / "out", until="train").ran

    assert until_train(data) == ("data", "float", "train")
    record = json.loads((tmp_path / "out" / "quickstart" / ".stages" / "data.json").read_text())
    assert record["info"]["train"]["images"] == 2
    assert not (tmp_path / "out" / "quickstart" / "data").exists()
    assert until_train(shutil.copytree(data, tmp_path / "moved")) == ()
    repaint(data / "images" / "train" / "000001.jpg")
    assert until_train(data) == ("data", "float", "train")


def test_names_are_looked_for_as_given_then_beside_the_recipe_then_under_qyolo_data(
    scenes, repository, tmp_path, monkeypatch
):
    for place in ("here", "beside", "shared"):
        root = shutil.copytree(scenes, tmp_path / place / "scenes")
        # Which of the three was taken shows in the number of images.
        for index in range(["here", "beside", "shared"].index(place) + 1):
            image = root / "images" / "train" / f"{index + 10:06d}.jpg"
            shutil.copy(root / "images" / "train" / "000000.jpg", image)
            shutil.copy(root / "labels" / "train" / "000000.txt", root / "labels" / "train" / f"{image.stem}.txt")
        shutil.rmtree(root / "annotations")
    content = yaml.safe_load((repository / "recipes" / "quickstart.yaml").read_text())
    content["data"] = {"source": "scenes"}
    recipe = tmp_path / "beside" / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("QYOLO_DATA", str(tmp_path / "shared"))
    for place, images in (("here", 3), ("beside", 4), ("shared", 5)):
        out = tmp_path / f"out-{place}"
        pipeline.build(recipe, out=out, until="data")
        record = json.loads((out / "quickstart" / ".stages" / "data.json").read_text())
        assert (place, record["info"]["train"]["images"]) == (place, images)
        shutil.rmtree(tmp_path / place / "scenes")
    with pytest.raises(InputError) as caught:
        pipeline.build(recipe, out=tmp_path / "out", until="data")
    assert all(str(tmp_path / place / "scenes") in str(caught.value) for place in ("here", "beside", "shared"))
    assert not (tmp_path / "out").exists()


def test_validation_data_without_any_object_is_refused_before_training(scenes, repository, tmp_path):
    data = shutil.copytree(scenes, tmp_path / "data")
    annotations = data / "annotations" / "instances_val.json"
    annotations.write_text(json.dumps({**json.loads(annotations.read_text()), "annotations": []}))
    with pytest.raises(InputError, match="no image of the split 'val' has an annotated object"):
        pipeline.build(repository / "recipes" / "quickstart.yaml", data=data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is left behind after an error ---------------------------------------------------------------------


def test_bad_input_removes_the_folders_that_were_made_and_no_others(repository, tmp_path):
    (tmp_path / "mine").mkdir()
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"nothing of the kind")
    settings = ("data.synthetic.train_images=1", "data.synthetic.val_images=1", f"model.weights={weights}")
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        pipeline.build(repository / "recipes" / "quickstart.yaml", settings, out=tmp_path / "mine" / "deep" / "runs")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "weights.safetensors"]


def test_bad_input_leaves_an_older_build_as_it_was(tiny_copy):
    before = content_of(tiny_copy.folder)
    with pytest.raises(InputError):
        rebuild(tiny_copy, "quantization.keep_float=[nothing]")
    after = content_of(tiny_copy.folder)
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {"recipe.resolved.yaml", "events.jsonl"}
    assert rebuild(tiny_copy).ran == ()
    assert verify_release(tiny_copy.folder / "release").manifest.name == "quickstart"


# --- what a build leaves ------------------------------------------------------------------------------------


def test_layout_of_a_build(tiny_build):
    folder = tiny_build.folder
    expected = [
        "recipe.resolved.yaml",
        "report.json",
        "report.html",
        "events.jsonl",
        "train/model.safetensors",
        "train/checkpoint.safetensors",
        "correct/model.safetensors",
        "correct/checkpoint.safetensors",
        "engines/onnxruntime/quickstart_w4a8.onnx",
        "engines/onnxruntime/quickstart_fp32.onnx",
        "engines/openvino/quickstart_w4a8_openvino_model/quickstart_w4a8.xml",
        "engines/openvino/quickstart_w4a8_openvino_model/quickstart_w4a8.bin",
        "engines/openvino/quickstart_w4a8_openvino_model/metadata.yaml",
        "release/manifest.json",
    ]
    assert [path for path in expected if not (folder / path).is_file()] == []
    resolved = load_recipe(folder / "recipe.resolved.yaml")
    assert resolved == load_recipe(tiny_build.recipe, tiny_build.settings)


def test_quantized_models_of_both_stages_are_readable_and_know_their_origin(tiny_build):
    trained = QuantizedModel.load(tiny_build.folder / "train" / "model.safetensors")
    corrected = QuantizedModel.load(tiny_build.folder / "correct" / "model.safetensors")
    assert trained.scheme == corrected.scheme == "w4a8"
    records = {name: json.loads((tiny_build.folder / ".stages" / f"{name}.json").read_text()) for name in ALL}
    digests = {name: Artifact.from_json(record).digest for name, record in records.items()}
    assert trained.lineage == {name: digests[name] for name in ("data", "float")}
    assert corrected.lineage == {name: digests[name] for name in ("data", "float", "train")}


def test_report_has_a_view_for_the_models_and_each_engine(tiny_build):
    views, recipe = tiny_build.report["views"], load_recipe(tiny_build.recipe)
    assert [view["name"] for view in views] == ["float", "fake_quantized", "onnxruntime", "openvino"]
    for view in views:
        for metric in METRICS:
            assert view[metric] is None or 0 <= view[metric] <= 1
        assert view["map50"] > view["map50_95"] > 0.1
        assert view["images"] == 12
        assert view["thresholds"] == {"conf": 0.001, "iou": 0.6, "max_det": 300}
        assert (view["imgsz"], view["letterbox"]) == (128, recipe.validate_.letterbox)
        assert view["per_class"].keys() == views[0]["per_class"].keys()
        assert view["digests"]["data"] == views[0]["digests"]["data"]
    engines = {view["name"]: view for view in views if view["name"] != "fake_quantized"}
    for view in engines.values():
        assert 0 < view["latency_ms"]["p50"] <= view["latency_ms"]["p95"]
    assert [view["precision_hint"] for view in views] == [None, None, None, "f32"]


def test_report_tells_sizes_and_digests_of_the_files_it_measured(tiny_build):
    views = {view["name"]: view for view in tiny_build.report["views"]}
    assert views["onnxruntime"]["digests"]["engine"] == sha256_file(tiny_build.onnx)
    assert views["onnxruntime"]["size_bytes"] == tiny_build.onnx.stat().st_size
    assert views["openvino"]["size_bytes"] == sum(file.stat().st_size for file in tiny_build.openvino.iterdir())
    corrected = tiny_build.folder / "correct" / "model.safetensors"
    assert views["fake_quantized"]["digests"]["model"] == sha256_file(corrected)
    assert (views["fake_quantized"]["size_bytes"], views["fake_quantized"]["latency_ms"]) == (None, None)


def test_release_holds_engines_model_report_and_recipe_as_they_are_in_the_build(tiny_build):
    verified = verify_release(tiny_build.folder / "release")
    digests = {file.path: file.sha256 for file in verified.files}
    corrected = digests.pop("model.safetensors")
    assert corrected == sha256_file(tiny_build.folder / "correct" / "model.safetensors")
    made_for_it = {path for path in digests if path.startswith("golden/")} | {"sbom.cdx.json"}
    assert "golden/golden.json" in made_for_it
    copied = digests.keys() - made_for_it
    assert {path: digests[path] for path in copied} == {path: sha256_file(tiny_build.folder / path) for path in copied}
    assert {"recipe.resolved.yaml", "report.json", "report.html"} < digests.keys()
    manifest = verified.manifest
    assert {engine.view for engine in manifest.engines} == {"float", "onnxruntime", "openvino"}
    views = {view["name"]: view for view in tiny_build.report["views"]}
    for engine in manifest.engines:
        assert engine.metrics["map50_95"] == views[engine.view]["map50_95"]
    assert [entry.stage for entry in manifest.lineage] == list(ALL[:-1])
    outputs = {entry.stage: entry.output for entry in manifest.lineage}
    for entry in manifest.lineage:  # every digest of a stage is that of what the stage before it has written
        assert all(value == outputs[name] for name, value in entry.inputs.items() if name in outputs)
    for engine in manifest.engines:
        assert engine.digest == digest_engine(tiny_build.folder / engine.path)
        assert engine.validated_on == {"val": manifest.datasets["val"]}


def test_the_manifest_follows_its_published_schema(qyolo, tiny_build):
    schema = json.loads(qyolo("release", "schema").stdout)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    manifest = json.loads((tiny_build.folder / "release" / "manifest.json").read_text())
    validator.validate(manifest)
    for key in ("digest", "engines", "schema_version", "files"):
        assert not validator.is_valid({name: value for name, value in manifest.items() if name != key})
    assert not validator.is_valid({**manifest, "surplus": 1})


@pytest.mark.slow
def test_two_builds_write_the_same_release_but_for_the_files_that_the_manifest_names(qyolo, tiny_build, tmp_path):
    outcome = qyolo(*tiny_build.arguments(), "--out", tmp_path, "--quiet")
    assert outcome.code == 0, outcome.stderr
    first, second = (verify_release(out / "quickstart" / "release") for out in (tiny_build.out, tmp_path))
    digests = [{file.path: file.sha256 for file in release.files} for release in (first, second)]
    varying = set(first.manifest.varying)
    assert varying == {"manifest.json", "report.html", "report.json"}
    assert {path for path in digests[0] if digests[0][path] != digests[1].get(path)} <= varying
    assert digests[0].keys() == digests[1].keys()


def test_records_tell_keys_inputs_and_files_of_every_stage(tiny_build):
    records = {}
    for name in ALL:
        text = (tiny_build.folder / ".stages" / f"{name}.json").read_text()
        records[name] = Artifact.from_json(json.loads(text))
        records[name].verify(tiny_build.folder)
        assert records[name].environment["torch"]
    for stage in pipeline.STAGES:
        assert {name: records[name].digest for name in stage.needs}.items() <= records[stage.name].inputs.items()
    assert "weights" in records["float"].inputs


def test_events_tell_start_and_end_of_every_stage(tiny_build):
    lines = (tiny_build.folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    told = [(event["stage"], event["event"]) for event in events[: 2 * len(ALL)]]
    assert told == [(stage, event) for stage in ALL for event in ("start", "end")]
    assert all(len(event["key"]) == 64 for event in events if event["event"] == "start")
    assert all(event["seconds"] >= 0 for event in events if event["event"] == "end")
    times = [event["time"] for event in events]
    assert times == sorted(times)


def test_a_build_leaves_no_temporary_files(tiny_build):
    names = [path.name for path in tiny_build.out.rglob("*")]
    assert not [name for name in names if "partial" in name or name.endswith(".tmp")]
    assert list(tiny_build.out.iterdir()) == [tiny_build.folder]
