"""Proof that a release folder holds exactly the files of its manifest, unchanged; no runtime is needed."""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qyolo_deploy.artifact import FileRecord, canonical_json, sha256_json
from qyolo_deploy.errors import InputError, IntegrityError
from qyolo_deploy.release.manifest import MANIFEST_NAME, SCHEMA_VERSION, SIGNATURE_NAME, Manifest, manifest_from_json
from qyolo_deploy.release.sign import check_signature, sign_manifest

# A manifest takes a few kilobytes; a far larger one is not read into memory.
MAX_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class VerifiedRelease:
    """A release whose every file has been compared with its manifest.

    Attributes:
        path: The release folder.
        manifest: What the manifest says.
        files: Every file apart from the manifest.
        digest: SHA-256 of the manifest's content; names the release as a whole.
        signature: `none`, `not checked` without a key, or `valid`.
    """

    path: Path
    manifest: Manifest
    files: tuple[FileRecord, ...]
    digest: str
    signature: Literal["none", "not checked", "valid"] = "none"

    @property
    def size_bytes(self) -> int:
        """Size of all files apart from the manifest."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class ReadManifest:
    """A manifest as it was read: its content, its digest, and its bytes, which are what is signed."""

    manifest: Manifest
    digest: str
    content: bytes


def verify_release(path: str | os.PathLike[str], key: Path | None = None) -> VerifiedRelease:
    """Return the release if it is whole and unchanged.

    Args:
        path: The release folder.
        key: PEM file of a public key, by whose holder the release must be signed.

    Raises:
        InputError: There is no folder at `path`, or the key is not usable.
        IntegrityError: The manifest is missing, damaged or of a newer schema, the signature is missing or wrong, or a
            file is missing, surplus, changed or not a regular file; the message names it.
        RuntimeMissingError: A signature is to be checked, but `cryptography` is not installed.
    """
    folder = Path(path)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {problem}; a release folder was expected.", f"It holds {MANIFEST_NAME}.")
    try:
        read = read_manifest(folder)
        files = tuple(FileRecord(file.path, file.sha256, file.size_bytes) for file in read.manifest.files)
        _compare_listing(folder, {file.path for file in files})
    except OSError as error:
        raise IntegrityError(f"{error.filename!r} cannot be read: {error.strerror}.") from error
    signature: Literal["none", "not checked", "valid"] = "none"
    if key is not None:
        check_signature(folder, read.content, key)
        signature = "valid"
    elif (folder / SIGNATURE_NAME).exists():
        signature = "not checked"
    for file in files:
        file.verify(folder)
    return VerifiedRelease(folder, read.manifest, files, read.digest, signature)


def sign_release(path: str | os.PathLike[str], key: Path) -> Path:
    """Sign a release that is whole and unchanged; an older signature is replaced.

    Args:
        path: The release folder.
        key: PEM file of a private key, see `release.sign`.

    Returns:
        The signature file.

    Raises:
        InputError: There is no folder at `path`, or the key is not usable.
        IntegrityError: The release is not what its manifest says.
        RuntimeMissingError: `cryptography` is not installed.
    """
    return sign_manifest(verify_release(path).path, key)


def read_manifest(folder: Path) -> ReadManifest:
    """The manifest of a release folder; that it fits the files is not looked at.

    Raises:
        IntegrityError: It is missing, damaged or of a newer schema.
    """
    body, digest, raw = _read_body(folder)
    return ReadManifest(manifest_from_json(body), digest, raw)


def _read_body(folder: Path) -> tuple[dict[str, Any], str, bytes]:
    file = folder / MANIFEST_NAME
    try:
        mode = file.lstat()
    except FileNotFoundError as error:
        hint = "Name the folder that holds it, or get the release again."
        raise IntegrityError(f"{folder} has no {MANIFEST_NAME}, so it cannot be verified.", hint) from error
    if not stat.S_ISREG(mode.st_mode):
        raise IntegrityError(f"{file} is not a regular file.")
    if mode.st_size > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{file} has {mode.st_size} bytes, far more than any manifest.")
    raw = file.read_bytes()
    try:
        body = json.loads(raw.decode())
        is_canonical = isinstance(body, dict) and canonical_json(body).encode() == raw
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{file} is not JSON as a release has it.") from error
    if not isinstance(body, dict):
        raise IntegrityError(f"{file} does not hold a JSON object.")
    _check_schema_version(file, body.get("schema_version"))
    if not is_canonical:
        raise IntegrityError(f"{file} was edited: it is not written as a release writes it.")
    digest = body.pop("digest", None)
    if digest != sha256_json(body):
        raise IntegrityError(f"{file} does not have the digest that it carries of itself.")
    return body, digest, raw


def _check_schema_version(file: Path, version: object) -> None:
    if type(version) is not int:
        raise IntegrityError(f"{file} names no whole number as its 'schema_version'.")
    if version > SCHEMA_VERSION:
        raise IntegrityError(
            f"{file} has schema_version {version}, but this qyolo_deploy reads at most {SCHEMA_VERSION}.",
            "Install a newer qyolo_deploy.",
        )


def _compare_listing(folder: Path, listed: set[str]) -> None:
    """Compare what lies below the folder with the manifest, before any content is read."""
    found = _regular_files(folder, "", _folders_of(listed))
    if missing := sorted(listed - found):
        raise IntegrityError(f"{folder / missing[0]} is missing.")
    if surplus := sorted(found - listed - {MANIFEST_NAME, SIGNATURE_NAME}):
        raise IntegrityError(f"{str(folder / surplus[0])!r} is not in the manifest.")


def _folders_of(listed: set[str]) -> set[str]:
    return {parent.as_posix() for path in listed for parent in Path(path).parents}


def _regular_files(folder: Path, below: str, expected_folders: set[str]) -> set[str]:
    """List the files below a folder; what is neither a regular file nor an expected folder is refused."""
    found = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{below}{entry.name}"
            if entry.is_symlink():
                raise IntegrityError(f"{entry.path!r} is a link; a release holds none.")
            if entry.is_file(follow_symlinks=False):
                found.add(path)
            elif not entry.is_dir(follow_symlinks=False):
                raise IntegrityError(f"{entry.path!r} is neither a file nor a folder.")
            elif path not in expected_folders:
                raise IntegrityError(f"The folder {entry.path!r} is not in the manifest.")
            else:
                found |= _regular_files(Path(entry.path), f"{path}/", expected_folders)
    return found
