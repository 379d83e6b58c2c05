import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qyolo_deploy.artifact import (
    Artifact,
    DigestCache,
    FileRecord,
    canonical_json,
    check_relative_path,
    environment_fingerprint,
    sha256_file,
    sha256_json,
)
from qyolo_deploy.atomic import _swap_in, atomic_dir, atomic_path, write_atomic
from qyolo_deploy.errors import InputError, IntegrityError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé☃"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abé", max_size=3), inner, max_size=3),
    max_leaves=8,
)


def names_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_sha256_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    # The example of FIPS 180-2, appendix B.1.
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_canonical_json_text():
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'
    assert sha256_json({"a": "é"}) == hashlib.sha256('{"a":"é"}'.encode()).hexdigest()


@given(JSON)
def test_canonical_json_survives_reading_back(value):
    text = canonical_json(value)
    assert canonical_json(json.loads(text)) == text


def test_canonical_json_of_whole_number_keys_is_that_of_the_file_they_are_written_to():
    names = {index: str(index) for index in range(12)}
    assert sha256_json(names) == sha256_json({str(index): name for index, name in reversed(names.items())})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_canonical_json_refuses_what_json_cannot_say(value):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(value)


@pytest.mark.parametrize("path", ["a", "a/b.onnx", "engines/onnxruntime/x_w4a8.onnx", "..a", "a b"])
def test_usable_relative_paths(path):
    assert check_relative_path(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/..",
        "/a",
        "//a",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "C:/a",
        "a\nb",
        "a\0",
    ],
)
def test_unusable_relative_paths(path):
    assert check_relative_path(path)
    with pytest.raises(IntegrityError, match="not usable"):
        FileRecord(path, "0" * 64, 1)


def test_write_atomic_replaces_and_makes_folders(tmp_path):
    file = tmp_path / "new" / "f.json"
    write_atomic(file, "é")
    write_atomic(file, b"\x00\x01")
    assert file.read_bytes() == b"\x00\x01"
    assert names_below(tmp_path) == ["new", "new/f.json"]


def test_write_atomic_obeys_the_umask(tmp_path):
    (tmp_path / "plain").write_text("")
    write_atomic(tmp_path / "f", "")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_path_keeps_the_older_file_after_an_error(tmp_path):
    file = tmp_path / "model.onnx"
    write_atomic(file, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(file) as temporary:
        assert temporary.suffix == ".onnx" and temporary.parent == file.parent
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert names_below(tmp_path) == ["model.onnx"]


def test_atomic_dir_replaces_the_whole_folder(tmp_path):
    for name in ("one", "two"):
        with atomic_dir(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / name).write_text(name)
    assert names_below(tmp_path) == ["out", "out/sub", "out/sub/two"]


def test_atomic_dir_keeps_the_older_folder_after_an_error(tmp_path):
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "old").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic_dir(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
        raise RuntimeError("stop")
    assert names_below(tmp_path) == ["out", "out/old"]


def test_swap_puts_the_older_folder_back_when_the_new_one_cannot_move_in(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(FileNotFoundError):
        _swap_in(tmp_path / "absent", tmp_path / "out", tmp_path / "aside")
    assert names_below(tmp_path) == ["out", "out/old"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk_is_explained(tmp_path):
    message = r"out\.bin cannot be written: No space left"
    with (
        pytest.raises(InputError, match=message) as caught,
        atomic_path(tmp_path / "out.bin"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert caught.value.exit_code == 2
    assert names_below(tmp_path) == []


def test_a_file_in_the_place_of_a_folder_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda path: write_atomic(path, "x"), lambda path: atomic_dir(path).__enter__()):
        with pytest.raises(InputError, match="cannot be written"):
            write(tmp_path / "file" / "below")


def test_errors_of_the_block_that_are_not_about_space_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "out"):
        (tmp_path / "absent").read_text()


def test_a_killed_writer_leaves_the_older_file(tmp_path):
    file = tmp_path / "f"
    file.write_text("old")
    code = (
        "import os, sys; from qyolo_deploy.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n    path.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(file)], check=False).returncode == -9
    assert file.read_text() == "old"


def make_artifact(root):
    (root / "sub").mkdir()
    (root / "b.bin").write_bytes(b"bb")
    (root / "sub" / "a.bin").write_bytes(b"aaa")
    return Artifact.of_files(
        root, ["sub/a.bin", root / "b.bin"], kind="engine", stage="export", key="k", info={"names": ["x"]}
    )


def test_artifact_records_files_in_order_and_verifies(tmp_path):
    artifact = make_artifact(tmp_path)
    assert [(file.path, file.size_bytes) for file in artifact.files] == [("b.bin", 2), ("sub/a.bin", 3)]
    artifact.verify(tmp_path)


def test_artifact_json_round_trip(tmp_path):
    artifact = make_artifact(tmp_path)
    assert Artifact.from_json(json.loads(canonical_json(artifact.to_json()))) == artifact


def test_artifact_digest_depends_on_content_alone(tmp_path):
    artifact = make_artifact(tmp_path)
    again = Artifact.of_files(tmp_path, ["b.bin", "sub/a.bin"], kind="x", stage="y", key="z")
    assert again.digest == artifact.digest
    (tmp_path / "b.bin").write_bytes(b"bc")
    assert Artifact.of_files(tmp_path, ["b.bin", "sub/a.bin"], kind="x", stage="y", key="z").digest != artifact.digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), r"a\.bin is missing"),
        (lambda file: file.write_bytes(b"aa"), r"a\.bin has 2 bytes, but 3"),
        (lambda file: file.write_bytes(b"aab"), r"a\.bin does not have the recorded SHA-256"),
        (lambda file: (file.unlink(), file.mkdir()), r"a\.bin is missing"),
    ],
)
def test_artifact_names_the_file_that_differs(tmp_path, damage, message):
    artifact = make_artifact(tmp_path)
    damage(tmp_path / "sub" / "a.bin")
    with pytest.raises(IntegrityError, match=message):
        artifact.verify(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"files": None},
        {"files": [{"path": "a"}]},
        {"files": [{"path": "../a", "sha256": "", "size_bytes": 1}]},
        {"files": [{"path": "a", "sha256": 5, "size_bytes": 1}]},
        {"files": [{"path": "a", "sha256": "", "size_bytes": "1"}]},
        {"surplus": 1},
        {"key": 1},
        {"inputs": []},
    ],
)
def test_damaged_artifact_records_are_refused(tmp_path, change):
    record = make_artifact(tmp_path).to_json()
    with pytest.raises(IntegrityError, match="record"):
        Artifact.from_json(record | change)
    del record["kind"]
    with pytest.raises(IntegrityError, match="kind"):
        Artifact.from_json(record)


def age(path, seconds):
    past = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(past, past))


def test_digest_cache_reads_an_unchanged_file_once(tmp_path):
    file = tmp_path / "big"
    file.write_bytes(b"abc")
    age(file, 60)
    state = file.stat()
    with DigestCache(tmp_path / "cache.json") as cache:
        first = cache.sha256(file)
    assert first == hashlib.sha256(b"abc").hexdigest()
    # Same size, inode and mtime: the cache cannot see this change, which shows that it did not read.
    file.write_bytes(b"xyz")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert DigestCache(tmp_path / "cache.json").sha256(file) == first
    age(file, 30)
    assert DigestCache(tmp_path / "cache.json").sha256(file) == hashlib.sha256(b"xyz").hexdigest()


def test_digest_cache_does_not_remember_files_just_written(tmp_path):
    file = tmp_path / "fresh"
    file.write_bytes(b"abc")
    cache = DigestCache(tmp_path / "cache.json")
    cache.sha256(file)
    state = file.stat()
    file.write_bytes(b"xyz")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert cache.sha256(file) == hashlib.sha256(b"xyz").hexdigest()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'{"PATH": 5}', b'{"PATH": [3, 2]}'])
def test_digest_cache_starts_over_from_a_damaged_file(tmp_path, content):
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    (tmp_path / "cache.json").write_bytes(content.replace(b"PATH", str(file).encode()))
    assert DigestCache(tmp_path / "cache.json").sha256(file) == hashlib.sha256(b"abc").hexdigest()


def test_environment_fingerprint_leaves_out_what_is_not_installed():
    fingerprint = environment_fingerprint(["numpy", "no-such-distribution-of-qyolo"])
    assert {"python", "platform", "machine", "cpu", "numpy"} == set(fingerprint)
    assert fingerprint["python"] == ".".join(str(part) for part in sys.version_info[:3])
