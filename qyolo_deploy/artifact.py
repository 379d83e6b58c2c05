"""What a stage leaves on disk: files known by digest, written whole or not at all, with their lineage."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.errors import IntegrityError

# A file changed within one clock tick of the file system keeps its timestamp (FAT counts in steps of 2 s),
# so the digest of a file this fresh is not remembered.
_FRESH_NS = 2_000_000_000
_CPUINFO = Path("/proc/cpuinfo")
_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
_BFLOAT16 = ("avx512_bf16", "amx_bf16")
_ABILITIES = ("avx2", *_VNNI, *_BFLOAT16, "asimddp", "i8mm")


def canonical_json(obj: object) -> str:
    """Write a value as the one JSON text that equal values share: keys sorted, no spaces, no NaN.

    Keys that are not strings become strings before they are sorted, so that a value and what is read back
    from its own file have the same text.

    Raises:
        TypeError: A part of the value has no JSON form.
        ValueError: A number is NaN or infinite.
    """
    plain = json.loads(json.dumps(obj, allow_nan=False))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_json(obj: object) -> str:
    """Return the hexadecimal SHA-256 of a value's canonical JSON in UTF-8."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes.

    Raises:
        OSError: The file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_relative_path(path: str) -> str | None:
    """Say why a recorded path must not be used below a root folder, or return None where it may.

    Allowed is one spelling only: relative, parts joined by `/`, no `.` or `..`, the same on every system.
    """
    if not path or any(ord(char) < 32 for char in path):
        return "it is empty or holds control characters"
    if "\\" in path or ":" in path:
        return "it holds a backslash or a drive"
    if path.startswith("/"):
        return "it is absolute"
    if ".." in path.split("/"):
        return "it leaves its folder"
    if str(PurePosixPath(path)) != path or path == ".":
        return "it is not in its plainest form"
    return None


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact.

    Attributes:
        path: Where it lies below the artifact's root, with `/` between parts.
        sha256: Hexadecimal digest of its bytes.
        size_bytes: Its length.
    """

    path: str
    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if reason := check_relative_path(self.path):
            raise IntegrityError(f"The recorded path {self.path!r} is not usable: {reason}.")

    @classmethod
    def of(cls, root: Path, path: str) -> "FileRecord":
        """Record the file `root / path` as it is now."""
        return cls(path, sha256_file(root / path), (root / path).stat().st_size)

    def verify(self, root: Path) -> None:
        """Return if `root / path` is the recorded file.

        Raises:
            IntegrityError: It is absent, not a regular file, or differs.
        """
        file = root / self.path
        try:
            if not file.is_file():
                raise IntegrityError(f"{file} is missing.")
            size_bytes = file.stat().st_size
            if size_bytes != self.size_bytes:
                raise IntegrityError(f"{file} has {size_bytes} bytes, but {self.size_bytes} are recorded.")
            if sha256_file(file) != self.sha256:
                raise IntegrityError(f"{file} does not have the recorded SHA-256.")
        except OSError as error:
            raise IntegrityError(f"{file} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True)
class Artifact:
    """What one run of a stage left behind.

    Attributes:
        kind: What the files are, such as `quantized_model` or `engine`.
        stage: The stage that wrote them.
        key: Digest of the stage's name, version, resolved section and inputs.
        files: Every file, with its digest.
        inputs: Digest of every input by name.
        environment: Versions and machine, see `environment_fingerprint`.
        info: Further facts as JSON values.
    """

    kind: str
    stage: str
    key: str
    files: tuple[FileRecord, ...]
    inputs: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_files(
        cls,
        root: str | os.PathLike[str],
        paths: Sequence[str | os.PathLike[str]],
        *,
        kind: str,
        stage: str,
        key: str,
        inputs: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> "Artifact":
        """Record files that a stage has just written.

        Args:
            root: Folder that the recorded paths are relative to.
            paths: Files below it, relative to it or as full paths; recorded in sorted order.
            kind: See the class, as for all further arguments.
            stage: See the class.
            key: See the class.
            inputs: See the class.
            environment: See the class.
            info: See the class.
        """
        base = Path(root)
        # `base / path` is `path` itself where that is absolute.
        relative = sorted({(base / path).relative_to(base).as_posix() for path in paths})
        files = tuple(FileRecord.of(base, path) for path in relative)
        return cls(kind, stage, key, files, dict(inputs or {}), dict(environment or {}), dict(info or {}))

    @property
    def digest(self) -> str:
        """Digest of the files alone: the same for the same content, whichever run wrote it."""
        return sha256_json([asdict(file) for file in self.files])

    def to_json(self) -> dict[str, Any]:
        """Return the artifact as a JSON object."""
        return asdict(self) | {"files": [asdict(file) for file in self.files]}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> "Artifact":
        """Read what `to_json` wrote.

        Raises:
            IntegrityError: Keys are missing, surplus or of the wrong type.
        """
        try:
            files = tuple(FileRecord(**entry) for entry in obj["files"])
            artifact = cls(**{**obj, "files": files})
        except (TypeError, KeyError) as error:
            raise IntegrityError(f"The record of an artifact is damaged: {error}.") from error
        texts = (artifact.kind, artifact.stage, artifact.key, *(file.sha256 for file in files))
        tables = (artifact.inputs, artifact.environment, artifact.info)
        if not (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(table, dict) for table in tables)
            and all(isinstance(file.size_bytes, int) for file in files)
        ):
            raise IntegrityError("The record of an artifact is damaged: a value has the wrong type.")
        return artifact

    def verify(self, root: str | os.PathLike[str]) -> None:
        """Return if every file below `root` is the recorded one.

        Raises:
            IntegrityError: One is absent or differs; the message names it.
        """
        for file in self.files:
            file.verify(Path(root))


class DigestCache:
    """Digests of big files, remembered as long as path, size, mtime and inode stay the same.

    Use it as a context manager, or call `save`. A cache file that is absent or damaged counts as empty.

    Args:
        file: JSON file that keeps the digests.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self._file = Path(file)
        self._entries = self._load()
        self._changed = False

    def _load(self) -> dict[str, list[int | str]]:
        try:
            entries = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}

    def sha256(self, path: str | os.PathLike[str]) -> str:
        """Return the hexadecimal SHA-256 of a file, read only where it is new or has changed.

        Raises:
            OSError: The file cannot be read.
        """
        absolute = Path(path).absolute()
        stat = absolute.stat()
        state: list[int | str] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._entries.get(str(absolute))
        if isinstance(known, list) and known[:-1] == state and isinstance(known[-1], str):
            return known[-1]
        digest = sha256_file(absolute)
        if time.time_ns() - stat.st_mtime_ns > _FRESH_NS:
            self._entries[str(absolute)] = [*state, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write the cache file where something has changed."""
        if self._changed:
            write_atomic(self._file, canonical_json(self._entries))
            self._changed = False

    def __enter__(self) -> "DigestCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.save()


def cpu_model() -> str:
    """Name of the processor; virtual machines often tell no more than its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, platform.processor())


def cpu_abilities() -> tuple[str, ...]:
    """Which of the processor's abilities that decide about integer kernels are there; empty where unknown."""
    words = _cpu_words(_CPUINFO)
    return tuple(ability for ability in _ABILITIES if ability in words)


def saturates_products(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether this processor's kernels add two products of uint8 and int8 in 16 bits, which saturate.

    Those of x86 without VNNI do (`vpmaddubsw`). Weights of at most 64 in magnitude are safe, as 2 * 255 * 64 fits.
    False where it is unknown.
    """
    return _lacks(_VNNI, cpuinfo)


def converts_bfloat16(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether this processor computes bfloat16 by way of float32, several times slower than float32 itself.

    False where it is unknown.
    """
    return _lacks(_BFLOAT16, cpuinfo)


def _lacks(abilities: Sequence[str], cpuinfo: Path) -> bool:
    """Whether this is an x86 processor that is known to have none of them."""
    words = _cpu_words(cpuinfo)
    return platform.machine().lower() in ("x86_64", "amd64") and bool(words) and not words & set(abilities)


def _cpu_words(cpuinfo: Path) -> set[str]:
    try:
        return set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return set()


def environment_fingerprint(packages: Sequence[str]) -> dict[str, str]:
    """Describe the interpreter, the machine and the installed versions of some distributions.

    Args:
        packages: Distribution names such as `torch`; those not installed are left out.
    """
    fingerprint = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
    }
    return fingerprint | package_versions(packages)


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions of some distributions; those not installed are left out."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
