import hashlib
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.errors import InputError, IntegrityError
from qyolo_deploy.release.bundle import write_release
from qyolo_deploy.release.manifest import (
    CreatedWith,
    EngineEntry,
    ModelCard,
    Postprocessing,
    Preprocessing,
    RecipeRef,
    ReleaseInfo,
)
from qyolo_deploy.release.verify import verify_release


def make_release(folder):
    sources = folder / "sources"
    sources.mkdir()
    (sources / "recipe.yaml").write_text("name: tiny\n")
    (sources / "tiny.onnx").write_bytes(bytes(range(32)))
    info = ReleaseInfo(
        name="tiny",
        version="1.0.0",
        created_with=CreatedWith(qyolo_deploy="0.1.0", environment={}),
        recipe=RecipeRef(path="recipe.yaml", sha256=sha256_file(sources / "recipe.yaml")),
        lineage=(),
        model=ModelCard(family="f", architecture="a", names=("x",), strides=(8,), imgsz=64),
        datasets={},
        preprocessing=Preprocessing(letterbox="square"),
        postprocessing=Postprocessing(conf=0.001, iou=0.6, max_det=300, multi_label=True),
        engines=(EngineEntry(view="onnxruntime", path="engines/tiny.onnx", format="onnx", scheme="w8a8"),),
        gates=(),
        licenses={},
    )
    files = {"recipe.yaml": sources / "recipe.yaml", "engines/tiny.onnx": sources / "tiny.onnx"}
    return write_release(folder / "release", files, info)


@pytest.fixture
def release(tmp_path):
    return make_release(tmp_path)


@pytest.fixture(scope="module")
def shared_release(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("shared"))


def rewrite_manifest(release, change):
    """Change the manifest as a forger would: canonical again, with a digest that fits."""
    file = release / "manifest.json"
    body = json.loads(file.read_bytes())
    del body["digest"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    body["digest"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def assert_refused(release, match):
    with pytest.raises(IntegrityError, match=match) as caught:
        verify_release(release)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_rewriting_the_manifest_without_a_change_is_harmless(release):
    before = (release / "manifest.json").read_bytes()
    rewrite_manifest(release, lambda body: None)
    assert (release / "manifest.json").read_bytes() == before
    verify_release(release)


def test_every_flipped_byte_of_a_small_file_is_found(release):
    for name in ("recipe.yaml", "engines/tiny.onnx"):
        data = (release / name).read_bytes()
        for index in range(len(data)):
            (release / name).write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
            assert_refused(release, f"{name} does not have the recorded SHA-256")
        (release / name).write_bytes(data)
    verify_release(release)


@settings(max_examples=200)
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_of_the_manifest_is_found(shared_release, position, flip):
    file = shared_release / "manifest.json"
    data = file.read_bytes()
    index = int(position * len(data))
    file.write_bytes(data[:index] + bytes([data[index] ^ flip]) + data[index + 1 :])
    try:
        assert_refused(shared_release, r"manifest\.json")
    finally:
        file.write_bytes(data)


@settings(max_examples=30)
@given(position=st.floats(0, 1, exclude_max=True))
def test_a_truncated_manifest_is_found(shared_release, position):
    file = shared_release / "manifest.json"
    data = file.read_bytes()
    file.write_bytes(data[: int(position * len(data))])
    try:
        assert_refused(shared_release, r"manifest\.json")
    finally:
        file.write_bytes(data)


def link_inside(release):
    (release / "recipe.yaml").rename(release / "real.yaml")
    (release / "recipe.yaml").symlink_to("real.yaml")


def link_folder_outside(release):
    (release / "engines").rename(release.parent / "elsewhere")
    (release / "engines").symlink_to(release.parent / "elsewhere")


def link_manifest(release):
    (release / "manifest.json").rename(release.parent / "manifest.json")
    (release / "manifest.json").symlink_to(release.parent / "manifest.json")


def folder_for_file(release):
    (release / "recipe.yaml").unlink()
    (release / "recipe.yaml").mkdir()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda release: (release / "engines/tiny.onnx").unlink(), r"tiny\.onnx is missing"),
        (
            lambda release: (release / "engines/tiny.onnx").write_bytes(b"short"),
            r"tiny\.onnx has 5 bytes, but 32",
        ),
        (lambda release: (release / "engines/more.onnx").touch(), r"more\.onnx' is not in the manifest"),
        (lambda release: (release / ".hidden").touch(), r"\.hidden' is not in the manifest"),
        (lambda release: (release / "new\nline").touch(), r"new\\nline' is not in the manifest"),
        (lambda release: (release / os.fsdecode(b"\xff")).touch(), "is not in the manifest"),
        (lambda release: (release / "empty").mkdir(), r"folder .*empty' is not in the manifest"),
        (folder_for_file, r"folder .*recipe\.yaml' is not in the manifest"),
        (link_inside, r"recipe\.yaml' is a link"),
        (link_folder_outside, r"engines' is a link"),
        (link_manifest, r"manifest\.json is not a regular file"),
        (lambda release: (release / "dangling").symlink_to("nowhere"), "dangling' is a link"),
        (lambda release: os.mkfifo(release / "pipe"), "pipe' is neither a file nor a folder"),
        (lambda release: (release / "manifest.json").unlink(), r"has no manifest\.json"),
    ],
)
def test_changed_folders_are_refused(release, damage, match):
    damage(release)
    assert_refused(release, match)


def test_a_link_is_refused_even_where_its_target_has_the_right_content(release):
    outside = release.parent / "same.yaml"
    (release / "recipe.yaml").rename(outside)
    (release / "recipe.yaml").symlink_to(outside)
    assert_refused(release, r"recipe\.yaml' is a link")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b'{"a": NaN}', "is not JSON"),
        (b'{"name":"\\ud800"}', "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
        (b"{}", "schema_version"),
        (b'{"schema_version":"1"}', "schema_version"),
        (b'{"schema_version":true}', "schema_version"),
        (b'{"schema_version": 1}', "was edited"),
        (b'{"schema_version":1,"schema_version":1}', "was edited"),
        (b'{"schema_version":1}', "digest"),
        (b'{"digest":null,"schema_version":1}', "digest"),
    ],
)
def test_broken_manifests_are_refused(release, content, match):
    (release / "manifest.json").write_bytes(content)
    assert_refused(release, match)


def test_a_huge_manifest_is_not_read(release):
    with (release / "manifest.json").open("r+b") as file:
        file.truncate(20 * 2**20)
    assert_refused(release, "far more than any manifest")


def test_a_newer_schema_is_named_with_the_way_out(release):
    rewrite_manifest(release, lambda body: body.update(schema_version=2, something_new={"a": 1}))
    with pytest.raises(IntegrityError, match="schema_version 2, but this qyolo_deploy reads at most 1") as caught:
        verify_release(release)
    assert "newer" in str(caught.value.hint)


def set_path(path):
    return lambda body: body["files"][0].update(path=path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_path("../outside"), r"'\.\./outside' is not usable: it leaves its folder"),
        (set_path("engines/../../outside"), "leaves its folder"),
        (set_path("/etc/passwd"), "is absolute"),
        (set_path("C:/windows"), "drive"),
        (set_path("engines\\tiny.onnx"), "backslash"),
        (set_path("engines//tiny.onnx"), "plainest form"),
        (set_path("./engines/tiny.onnx"), "plainest form"),
        (set_path(""), "empty"),
        (set_path("a\nb"), "control characters"),
        (set_path("manifest.json"), r"manifest\.json itself"),
        (set_path(5), r"files\.0\.path"),
        (lambda body: body["files"].append(body["files"][0]), "listed twice"),
        (lambda body: body["files"].append({**body["files"][0], "path": "Recipe.YAML"}), "listed twice"),
        (
            lambda body: body["files"].append({**body["files"][0], "path": "engines"}),
            "as a file and as a folder",
        ),
        (lambda body: body["files"].append({**body["files"][0], "path": "more"}), r"more is missing"),
        (
            lambda body: body["files"][0].update(sha256="0" * 64),
            r"tiny\.onnx does not have the recorded SHA-256",
        ),
        (lambda body: body["files"][0].update(sha256="A" * 64), r"files\.0\.sha256"),
        (lambda body: body["files"][0].update(size_bytes=31), r"tiny\.onnx has 32 bytes, but 31"),
        (lambda body: body["files"][0].update(size_bytes=-1), r"files\.0\.size_bytes"),
        (lambda body: body["files"][0].update(size_bytes=32.5), r"files\.0\.size_bytes"),
        (lambda body: body["files"][0].update(mode=0o777), r"files\.0\.mode"),
        (lambda body: body["files"].pop(0), "engine 'engines/tiny.onnx' is not among the files"),
        (lambda body: body["recipe"].update(path="../recipe.yaml"), "leaves its folder"),
        (lambda body: body["recipe"].update(path="other.yaml"), "recipe 'other.yaml' is not among the files"),
        (lambda body: body["engines"][0].update(path="../../lib.so"), "leaves its folder"),
        (lambda body: body.update(surplus=1), "surplus"),
        (lambda body: body.pop("model"), "model"),
        (lambda body: body.update(schema_version=0), "schema_version"),
    ],
)
def test_forged_manifests_are_refused(release, change, match):
    rewrite_manifest(release, change)
    assert_refused(release, match)


def test_what_is_no_folder_is_bad_input(tmp_path, release):
    for path in (tmp_path / "absent", release / "recipe.yaml"):
        with pytest.raises(InputError, match="a release folder was expected") as caught:
            verify_release(path)
        assert caught.value.exit_code == 2


def test_a_link_to_a_release_may_be_named(tmp_path, release):
    (tmp_path / "current").symlink_to(release)
    assert verify_release(tmp_path / "current").manifest.name == "tiny"
