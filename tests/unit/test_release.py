import hashlib
import json
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.errors import InputError
from qyolo_deploy.release.bundle import write_release
from qyolo_deploy.release.manifest import (
    CreatedWith,
    EngineEntry,
    GateEntry,
    LineageEntry,
    ModelCard,
    Postprocessing,
    Preprocessing,
    RecipeRef,
    ReleaseInfo,
)
from qyolo_deploy.release.verify import verify_release

ONNX = "engines/onnxruntime/tiny_w4a8.onnx"


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    contents = {
        "recipe.resolved.yaml": b"name: tiny\n",
        "model.safetensors": bytes(range(40)),
        ONNX: b"onnx bytes",
        "engines/openvino/tiny_w4a8_openvino_model/tiny.xml": b"<net/>",
        "engines/openvino/tiny_w4a8_openvino_model/tiny.bin": b"",
    }
    files = {}
    for path, content in contents.items():
        files[path] = folder / path.replace("/", "_")
        files[path].write_bytes(content)
    return files


def make_info(recipe_sha256, **changes):
    gate = GateEntry(view="onnxruntime", metric="map50_95", op=">=", bound=0.5, observed=0.6, passed=True)
    fields = {
        "name": "tiny",
        "version": "1.0.0",
        "created_with": CreatedWith(qyolo_deploy="0.1.0", environment={"python": "3.11.7"}),
        "recipe": RecipeRef(path="recipe.resolved.yaml", sha256=recipe_sha256),
        "lineage": (LineageEntry(stage="train", key="a" * 64, inputs={"weights": "b" * 64}),),
        "model": ModelCard(
            family="yolov5", architecture="yolov5n", names=("cat", "dog"), strides=(8, 16, 32), imgsz=640
        ),
        "datasets": {"val": "c" * 64},
        "preprocessing": Preprocessing(letterbox="rect"),
        "postprocessing": Postprocessing(conf=0.25, iou=0.6, max_det=300, multi_label=True),
        "engines": (
            EngineEntry(view="onnxruntime", path=ONNX, format="onnx", scheme="w4a8", metrics={"map50_95": 0.6}),
            EngineEntry(view="openvino", path="engines/openvino/tiny_w4a8_openvino_model", format="ir", scheme="w4a8"),
        ),
        "gates": (gate,),
        "licenses": {"software": "AGPL-3.0-or-later"},
    }
    return ReleaseInfo(**{**fields, **changes})


@pytest.fixture
def info(sources):
    return make_info(sha256_file(sources["recipe.resolved.yaml"]))


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_release_holds_copies_and_verifies(tmp_path, sources, info):
    folder = write_release(tmp_path / "release", sources, info)
    release = verify_release(folder)
    content = content_of(folder)
    assert set(content) == {*sources, "manifest.json"}
    assert all(content[path] == source.read_bytes() for path, source in sources.items())
    assert release.manifest.model == info.model and release.manifest.gates == info.gates
    assert release.size_bytes == sum(len(data) for path, data in content.items() if path != "manifest.json")


def test_the_manifest_lists_every_other_file_with_its_digest(tmp_path, sources, info):
    folder = write_release(tmp_path / "release", sources, info)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["schema_version"] == 1
    assert {entry["path"]: (entry["sha256"], entry["size_bytes"]) for entry in manifest["files"]} == {
        path: (hashlib.sha256(source.read_bytes()).hexdigest(), source.stat().st_size)
        for path, source in sources.items()
    }


def test_the_manifest_digest_is_that_of_the_rest_of_the_manifest(tmp_path, sources, info):
    folder = write_release(tmp_path / "release", sources, info)
    body = json.loads((folder / "manifest.json").read_bytes())
    digest = body.pop("digest")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert digest == hashlib.sha256(text.encode()).hexdigest() == verify_release(folder).digest


def test_the_same_inputs_give_the_same_bytes(tmp_path, sources, info):
    first = write_release(tmp_path / "one", sources, info)
    second = write_release(tmp_path / "two", dict(reversed(sources.items())), info)
    assert content_of(first) == content_of(second)


def test_an_older_release_is_replaced_whole(tmp_path, sources, info):
    out = tmp_path / "release"
    write_release(out, {**sources, "extra.txt": sources[ONNX]}, info)
    assert "extra.txt" not in content_of(write_release(out, sources, info))
    verify_release(out)
    assert {path.name for path in tmp_path.iterdir()} == {"release", "sources"}


def test_linked_sources_are_copied(tmp_path, sources, info):
    link = tmp_path / "link.onnx"
    link.symlink_to(sources[ONNX])
    release = verify_release(write_release(tmp_path / "release", {**sources, ONNX: link}, info))
    assert not (release.path / ONNX).is_symlink()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../evil", "leaves its folder"),
        ("/etc/evil", "absolute"),
        ("a\\b", "backslash"),
        ("manifest.json", "its manifest"),
        ("MODEL.safetensors", "listed twice"),
        ("model.safetensors/part", "both as a file and as a folder"),
    ],
)
def test_paths_that_a_release_cannot_hold(tmp_path, sources, info, path, message):
    with pytest.raises(InputError, match=message):
        write_release(tmp_path / "release", {**sources, path: sources[ONNX]}, info)
    assert not (tmp_path / "release").exists()


def test_a_missing_source_is_named_and_nothing_is_left(tmp_path, sources, info):
    sources[ONNX].unlink()
    with pytest.raises(InputError, match=r"tiny_w4a8\.onnx is missing"):
        write_release(tmp_path / "release", sources, info)
    assert {path.name for path in tmp_path.iterdir()} == {"sources"}


def test_a_recipe_or_engine_outside_the_files_is_refused(tmp_path, sources, info):
    with pytest.raises(InputError, match=r"recipe 'recipe\.resolved\.yaml'"):
        write_release(tmp_path / "release", sources, make_info("0" * 64))
    del sources[ONNX]
    with pytest.raises(InputError, match=r"engine 'engines/onnxruntime/tiny_w4a8\.onnx'"):
        write_release(tmp_path / "release", sources, info)
    assert {path.name for path in tmp_path.iterdir()} == {"sources"}


@pytest.mark.parametrize(
    "changes", [{"surprise": 1}, {"version": 1}, {"datasets": {"val": "no digest"}}, {"engines": ()}]
)
def test_release_info_refuses_unknown_keys_and_wrong_values(changes):
    with pytest.raises(ValidationError):
        make_info("0" * 64, **changes)


def test_verifying_needs_no_torch_and_is_fast(tmp_path, sources, info):
    sources["model.safetensors"].write_bytes(bytes(50_000_000))
    folder = write_release(tmp_path / "release", sources, info)
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from qyolo_deploy.release.verify import verify_release\n"
        "verify_release(sys.argv[1])\n"
        "print(time.perf_counter() - start, *{'torch', 'jinja2', 'yaml', 'cv2'} & set(sys.modules))"
    )
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 10  # 2 s are the aim; the margin is for busy machines
    assert len(run.stdout.split()) == 1
