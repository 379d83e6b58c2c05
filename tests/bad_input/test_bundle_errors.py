"""Signatures and packed releases: what is accepted, and dozens of forgeries with the reason why each is refused."""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from helpers.releases import ENGINE, make_release

from qyolo_deploy.errors import InputError, IntegrityError
from qyolo_deploy.release.oci import ARTIFACT_TYPE, pack_oci
from qyolo_deploy.release.pack import pack_tar, unpack, verify_packed
from qyolo_deploy.release.verify import sign_release, verify_release

KEYS = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def write_keys(folder, private, password=None):
    cipher = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "private.pem").write_bytes(private.private_bytes(pem, pkcs8, cipher))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "public.pem").write_bytes(private.public_key().public_bytes(pem, form))
    return folder / "private.pem", folder / "public.pem"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A signed release with its keys; who changes it takes `release`."""
    folder = tmp_path_factory.mktemp("signed")
    make_release(folder)
    sign_release(folder / "release", write_keys(folder, KEYS["p256"]())[0])
    return folder


@pytest.fixture
def release(original, tmp_path):
    return shutil.copytree(original / "release", tmp_path / "release")


@pytest.fixture
def public(original):
    return original / "public.pem"


# --- signatures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_key_signs_and_verifies_and_repeats_itself(release, tmp_path, kind):
    private, public = write_keys(tmp_path, KEYS[kind]())
    first = sign_release(release, private).read_bytes()
    assert verify_release(release, public).signature == "valid"
    assert sign_release(release, private).read_bytes() == first
    assert verify_release(release).signature == "not checked"


def test_openssl_verifies_the_signature(release, public, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command")
    (tmp_path / "sig").write_bytes(base64.b64decode((release / "manifest.json.sig").read_bytes()))
    line = ["openssl", "dgst", "-sha256", "-verify", public, "-signature", tmp_path / "sig", release / "manifest.json"]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "Verified OK\n"


def test_an_encrypted_key_takes_its_password_from_the_environment(release, tmp_path, monkeypatch):
    private, public = write_keys(tmp_path, KEYS["p256"](), b"secret")
    monkeypatch.delenv("QYOLO_SIGN_PASSWORD", raising=False)
    with pytest.raises(InputError) as caught:
        sign_release(release, private)
    assert "QYOLO_SIGN_PASSWORD" in caught.value.hint
    monkeypatch.setenv("QYOLO_SIGN_PASSWORD", "wrong")
    with pytest.raises(InputError, match="and its password"):
        sign_release(release, private)
    monkeypatch.setenv("QYOLO_SIGN_PASSWORD", "secret")
    sign_release(release, private)
    verify_release(release, public)


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_is_bad_input(release, tmp_path, content):
    (tmp_path / "key.pem").write_bytes(content)
    for use in (sign_release, verify_release):
        with pytest.raises(InputError, match=r"key\.pem: expected"):
            use(release, tmp_path / "key.pem")


def test_keys_of_other_kinds_are_refused(release, tmp_path):
    private, public = write_keys(tmp_path, rsa.generate_private_key(65537, 2048))
    for use, key in ((sign_release, private), (verify_release, public)):
        with pytest.raises(InputError, match="expected an ECDSA or Ed25519 key"):
            use(release, key)


def test_a_changed_release_is_not_signed(release, original):
    (release / ENGINE).write_bytes(b"other")
    with pytest.raises(IntegrityError):
        sign_release(release, original / "private.pem")


def forge(release):
    """Change a file and the manifest with it, as one would who can compute digests."""
    (release / "recipe.yaml").write_text("name: forged\n")
    body = json.loads((release / "manifest.json").read_bytes())
    del body["digest"]
    digest = hashlib.sha256(b"name: forged\n").hexdigest()
    entry = next(file for file in body["files"] if file["path"] == "recipe.yaml")
    entry.update(sha256=digest, size_bytes=13)
    body["recipe"]["sha256"] = digest
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    body["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (release / "manifest.json").write_text(json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def edit_signature(change):
    def apply(release):
        file = release / "manifest.json.sig"
        file.write_bytes(change(file.read_bytes()))

    return apply


def other_signature(release):
    other = release.parent / "other"
    other.mkdir()
    sign_release(release, write_keys(other, KEYS["p256"]())[0])


def link_signature(release):
    file = release / "manifest.json.sig"
    file.rename(release.parent / "sig")
    file.symlink_to(release.parent / "sig")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda release: (release / "manifest.json.sig").unlink(), "is not signed"),
        (other_signature, "is not a signature of .*public.pem"),
        (forge, "is not a signature of .*public.pem"),
        (edit_signature(lambda data: b""), "is not a signature of"),
        (edit_signature(lambda data: b"%%%"), "not a signature in base64"),
        (edit_signature(lambda data: data[:40]), "is not a signature of"),
        (edit_signature(lambda data: base64.b64encode(b"x" * 70)), "is not a signature of"),
        (edit_signature(lambda data: data * 100), "is not a signature of"),
        (link_signature, r"manifest\.json\.sig' is a link"),
    ],
)
def test_wrong_signatures_are_refused(release, public, damage, match):
    damage(release)
    with pytest.raises(IntegrityError, match=match) as caught:
        verify_release(release, public)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4


def test_a_forged_release_passes_only_without_the_key(release):
    """Digests alone tell damage, not who wrote them: that is what the signature is for."""
    forge(release)
    assert verify_release(release).signature == "not checked"


# --- archives -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(original):
    return pack_tar(verify_release(original / "release"), original / "toy.tar.zst")


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_packed_release_verifies_and_unpacks_to_the_same_files(original, packed, public, tmp_path):
    assert verify_packed(packed, public).signature == "valid"
    assert unpack(packed, tmp_path / "out", public).path == tmp_path / "out"
    assert content_of(tmp_path / "out") == content_of(original / "release")


def test_packing_again_gives_the_same_bytes(release, packed, tmp_path):
    (release / "recipe.yaml").touch()
    again = pack_tar(verify_release(release), tmp_path / "again.tar.zst")
    assert again.read_bytes() == packed.read_bytes()


def test_another_tool_reads_it_and_finds_no_owner_and_no_time(packed):
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(packed.read_bytes())
    with tarfile.open(mode="r:", fileobj=io.BytesIO(raw)) as archive:
        members = archive.getmembers()
    names = [member.name for member in members]
    assert names[:2] == ["manifest.json", "manifest.json.sig"] and names[2:] == sorted(names[2:])
    facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members}
    assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


def test_an_existing_folder_is_not_written_over(packed, tmp_path):
    with pytest.raises(InputError, match="is there already"):
        unpack(packed, tmp_path)


def test_the_wrong_key_is_told_and_nothing_is_left(packed, tmp_path):
    _, other = write_keys(tmp_path, KEYS["p256"]())
    with pytest.raises(IntegrityError, match="not a signature of"):
        unpack(packed, tmp_path / "out", other)
    assert {path.name for path in tmp_path.iterdir()} == {"private.pem", "public.pem"}


def members_of(release):
    paths = sorted(content_of(release), key=lambda path: (not path.startswith("manifest.json"), path))
    return [(tarfile.TarInfo(path), (release / path).read_bytes()) for path in paths]


def write_archive(file, members, compressor=None):
    buffer = io.BytesIO()
    with tarfile.open(mode="w", fileobj=buffer, format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    file.write_bytes((compressor or zstandard.ZstdCompressor()).compress(buffer.getvalue()))
    return file


def member(path, data=b"", **changes):
    info = tarfile.TarInfo(path)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, data


def add(*entry, **changes):
    return lambda members: members.append(member(*entry, **changes))


def swap(path, data):
    """Another content for a file."""

    def apply(members):
        index = next(index for index, (info, _) in enumerate(members) if info.name == path)
        members[index] = member(path, data)

    return apply


def drop(path):
    return lambda members: members.remove(next(entry for entry in members if entry[0].name == path))


def rename(path, name):
    def apply(members):
        next(info for info, _ in members if info.name == path).name = name

    return apply


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (add("../evil", b"x"), r"'\.\./evil' is not usable: it leaves its folder"),
        (add("golden/../../evil", b"x"), "leaves its folder"),
        (add("/tmp/evil", b"x"), "is absolute"),
        (add("C:/evil", b"x"), "drive"),
        (add("a\\b", b"x"), "backslash"),
        (add("./recipe.yaml", b"x"), "plainest form"),
        (add("golden//golden.json", b"x"), "plainest form"),
        (add("extra.txt", b"x"), "'extra.txt' is not in the manifest"),
        (add(".hidden", b""), "'.hidden' is not in the manifest"),
        (add("recipe.yaml", b"name: toy\n"), "'recipe.yaml' is there twice"),
        (add("manifest.json", b"{}"), "'manifest.json' is there twice"),
        (add("manifest.json.sig", b"x"), "'manifest.json.sig' is there twice"),
        (add("folder", type=tarfile.DIRTYPE), "'folder' is not a regular file"),
        (add("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'link' is not a regular file"),
        (add("link", type=tarfile.SYMTYPE, linkname="recipe.yaml"), "'link' is not a regular file"),
        (add("link", type=tarfile.LNKTYPE, linkname="recipe.yaml"), "'link' is not a regular file"),
        (add("pipe", type=tarfile.FIFOTYPE), "'pipe' is not a regular file"),
        (add("device", type=tarfile.CHRTYPE), "'device' is not a regular file"),
        (drop("recipe.yaml"), r"recipe\.yaml is missing"),
        (drop(ENGINE), r"toy\.onnx is missing"),
        (drop("manifest.json"), r"does not begin with its manifest\.json"),
        (lambda members: members.reverse(), r"does not begin with its manifest\.json"),
        (lambda members: members.clear(), r"does not begin with its manifest\.json"),
        (swap("recipe.yaml", b"name: tox\n"), r"recipe\.yaml does not have the recorded SHA-256"),
        (swap("recipe.yaml", b"name: longer\n"), "'recipe.yaml' has 13 bytes, but 10 are recorded"),
        (swap("recipe.yaml", bytes(50_000_000)), "'recipe.yaml' has 50000000 bytes, but 10 are recorded"),
        (swap("manifest.json", b"{}"), "schema_version"),
        (swap("manifest.json", b'{"schema_version":2}'), "schema_version 2"),
        (swap("manifest.json", b" " * (17 * 2**20)), "far more than any manifest"),
        (swap("manifest.json.sig", b"A" * 5000), "'manifest.json.sig' is not in the manifest"),
        (rename("recipe.yaml", "Recipe.yaml"), "'Recipe.yaml' is not in the manifest"),
        (add("x", b"", pax_headers={"comment": "c" * 2**22}), "holds more than its headers say"),
    ],
)
def test_tampered_archives_are_refused(release, tmp_path, change, match):
    members = members_of(release)
    change(members)
    file = write_archive(tmp_path / "bad.tar.zst", members)
    with pytest.raises(IntegrityError, match=match) as caught:
        verify_packed(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 4
    before = set(tmp_path.iterdir())
    with pytest.raises(IntegrityError):
        unpack(file, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before and not (tmp_path.parent / "evil").exists()


def test_the_archive_that_is_not_tampered_with_is_accepted(release, tmp_path):
    verify_packed(write_archive(tmp_path / "good.tar.zst", members_of(release)))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda data: b"", "is damaged|does not begin"),
        (lambda data: b"no archive at all", "is damaged"),
        (lambda data: data[: len(data) // 2], "is damaged|is missing"),
        (lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:], "is damaged|not have|more than|is not JSON"),
        (lambda data: zstandard.ZstdCompressor().compress(bytes(10**8)), "does not begin|is damaged"),
        (lambda data: zstandard.ZstdCompressor().compress(b"x" * 2000), "is damaged"),
    ],
)
def test_damaged_archives_are_refused(packed, tmp_path, content, match):
    file = tmp_path / "bad.tar.zst"
    file.write_bytes(content(packed.read_bytes()))
    with pytest.raises(IntegrityError, match=match) as caught:
        verify_packed(file)
    assert "\n" not in str(caught.value)


def test_a_window_of_gigabytes_is_not_given(tmp_path):
    """A frame that asks its reader for a buffer of 1 GiB, in a few bytes."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    file = tmp_path / "wide.tar.zst"
    file.write_bytes(stream.compress(b"x" * 2000) + stream.flush())
    assert zstandard.get_frame_parameters(file.read_bytes()).window_size == 2**30
    with pytest.raises(IntegrityError, match="is damaged, or not compressed by zstd"):
        verify_packed(file)


def test_a_missing_archive_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        verify_packed(tmp_path / "absent.tar.zst")


# --- OCI ----------------------------------------------------------------------------------------------------


def blob(layout, descriptor):
    algorithm, digest = descriptor["digest"].split(":")
    data = (layout / "blobs" / algorithm / digest).read_bytes()
    assert hashlib.new(algorithm, data).hexdigest() == digest and len(data) == descriptor["size"]
    return data


def test_an_oci_layout_holds_every_file_under_its_title(original, tmp_path):
    layout = pack_oci(verify_release(original / "release"), tmp_path / "layout")
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "1.0.0"}
    manifest = json.loads(blob(layout, entry))
    assert manifest["artifactType"] == entry["artifactType"] == ARTIFACT_TYPE
    assert blob(layout, manifest["config"]) == b"{}"
    title = "org.opencontainers.image.title"
    titles = {layer["annotations"][title]: blob(layout, layer) for layer in manifest["layers"]}
    assert titles == content_of(original / "release")
    again = pack_oci(verify_release(original / "release"), tmp_path / "again")
    assert content_of(again) == content_of(layout)


def test_skopeo_copies_the_layout(original, tmp_path):
    if shutil.which("skopeo") is None:
        pytest.skip("there is no skopeo command")
    layout = pack_oci(verify_release(original / "release"), tmp_path / "layout")
    line = ["skopeo", "--insecure-policy", "copy", f"oci:{layout}:1.0.0", f"oci:{tmp_path / 'copy'}:1.0.0"]
    subprocess.run(line, check=True, capture_output=True)
    blobs = "blobs/sha256"
    assert content_of(tmp_path / "copy" / blobs) == content_of(layout / blobs)


# --- the command line ---------------------------------------------------------------------------------------


def test_a_release_goes_through_all_commands(qyolo, release, tmp_path):
    private, public = write_keys(tmp_path, KEYS["ed25519"]())
    file, layout, out = tmp_path / "toy.tar.zst", tmp_path / "layout", tmp_path / "out"
    assert qyolo("release", "sign", release, "--json", QYOLO_SIGN_KEY=str(private)).code == 0
    assert qyolo("release", "pack", release, "--out", file, "--json").json["packed"] == str(file)
    assert qyolo("release", "pack", release, "--format", "oci", "--out", layout).code == 0
    assert qyolo("release", "unpack", file, "--out", out, "--key", public, "--json").json["signature"] == "valid"
    facts = [qyolo("verify", path, "--key", public, "--json").json for path in (release, file, out)]
    assert {(fact["signature"], fact["digest"]) for fact in facts} == {("valid", facts[0]["digest"])}
    assert content_of(out) == content_of(release)


def test_refusals_are_one_sentence_and_exit_code_4(qyolo, release, tmp_path):
    _, other = write_keys(tmp_path, KEYS["p256"]())
    for arguments in (("verify", release, "--key", other), ("verify", write_archive(tmp_path / "bad.tar.zst", []))):
        outcome = qyolo(*arguments, "--json")
        assert outcome.code == outcome.json["exit_code"] == 4
        assert outcome.stderr.count("\n") == 1 and outcome.stderr.startswith("error: ")


def test_a_key_that_cannot_sign_is_told_before_the_build(qyolo, tmp_path):
    _, public = write_keys(tmp_path, KEYS["p256"]())
    recipe = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
    outcome = qyolo("build", recipe, "--sign-key", public, "--out", tmp_path / "runs", "--json")
    assert outcome.code == 2 and "expected an unbroken private key" in outcome.json["error"]
    assert not (tmp_path / "runs").exists()
