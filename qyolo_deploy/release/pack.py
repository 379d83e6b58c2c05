"""A release as one reproducible `.tar.zst`, and back; what comes back is trusted no more than its manifest."""

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Final

from qyolo_deploy.artifact import check_relative_path
from qyolo_deploy.atomic import atomic_dir, atomic_path
from qyolo_deploy.errors import InputError, IntegrityError, RuntimeMissingError
from qyolo_deploy.release.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from qyolo_deploy.release.verify import MAX_MANIFEST_BYTES, VerifiedRelease, read_manifest, verify_release

SUFFIX: Final = ".tar.zst"
MAX_BYTES: Final = 8 * 2**30
_LEVEL = 19
_MAX_WINDOW = 2**27
_MAX_SIGNATURE_BYTES = 4096
# Headers of one member, with a long name in a header of its own, and what tarfile reads ahead.
_HEADERS_BYTES = 2**17
_CHUNK = 2**20


def pack_tar(release: VerifiedRelease, out: Path) -> Path:
    """Write a verified release as `.tar.zst`: the manifest first, then by path, no owner, no time.

    The same release and the same version of `zstandard` give the same bytes.

    Raises:
        InputError: `out` has another suffix or cannot be written.
        RuntimeMissingError: `zstandard` is not installed.
    """
    if not out.name.endswith(SUFFIX):
        raise InputError(f"{out}: expected a name that ends in {SUFFIX}")
    compressor = _zstandard().ZstdCompressor(level=_LEVEL, write_checksum=True)
    with (
        atomic_path(out) as temporary,
        temporary.open("wb") as raw,
        compressor.stream_writer(raw, closefd=False) as stream,
        tarfile.open(mode="w|", fileobj=stream, format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in release_paths(release):
            file = release.path / path
            info = tarfile.TarInfo(path)  # mode 0644, owner 0, time 0
            info.size = file.stat().st_size
            with file.open("rb") as content:
                archive.addfile(info, content)
    return out


def release_paths(release: VerifiedRelease) -> list[str]:
    """All files of a release, manifest and signature in front."""
    first = [MANIFEST_NAME]
    if (release.path / SIGNATURE_NAME).is_file():
        first.append(SIGNATURE_NAME)
    return first + sorted(file.path for file in release.files)


def verify_packed(file: Path, key: Path | None = None) -> VerifiedRelease:
    """The packed release, if it is whole and unchanged; nothing is left of it on the disk.

    Raises:
        InputError: The file cannot be read.
        IntegrityError: It is no such archive, or not the release that its manifest describes.
        RuntimeMissingError: `zstandard` is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="qyolo-") as folder:
        _extract(file, Path(folder))
        try:
            return replace(verify_release(folder, key), path=file)
        except IntegrityError as error:
            raise IntegrityError(str(error).replace(f"{folder}{os.sep}", f"{file}: "), error.hint) from error


def unpack(file: Path, out: Path, key: Path | None = None) -> VerifiedRelease:
    """Unpack and verify; the folder appears whole, or not at all.

    Raises:
        InputError: `file` cannot be read, or `out` is there already or cannot be written.
        IntegrityError: As for `verify_packed`.
        RuntimeMissingError: `zstandard` is not installed.
    """
    if out.exists():
        raise InputError(f"{out}: is there already, expected the name of a new folder")
    with atomic_dir(out) as temporary:
        _extract(file, temporary)
        verified = verify_release(temporary, key)
    return replace(verified, path=out)


class _Budget(io.RawIOBase):
    """A reader that gives no more than was asked for: the size of an archive is what its writer says."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source, self._left = source, _HEADERS_BYTES

    def allow(self, size_bytes: int) -> None:
        """Give so much more, and the headers behind it."""
        self._left = size_bytes + _HEADERS_BYTES

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size if size >= 0 else _CHUNK)
        self._left -= len(data)
        if self._left < 0:
            raise IntegrityError("holds more than its headers say")
        return data


def _extract(file: Path, folder: Path) -> None:
    """Write the members, which must be regular files of the manifest, with its sizes."""
    try:
        with _members(file) as (archive, budget):
            manifest = _first(archive, budget, folder)
            sizes = {entry.path: entry.size_bytes for entry in manifest.files}
            if sum(sizes.values()) > MAX_BYTES:
                raise IntegrityError(f"its manifest tells of more than {MAX_BYTES >> 30} GiB")
            seen: set[str] = set()
            while (member := archive.next()) is not None:
                path = _check_member(member, seen)
                if path == SIGNATURE_NAME and member.size <= _MAX_SIGNATURE_BYTES:
                    pass
                elif path not in sizes:
                    raise IntegrityError(f"{path!r} is not in the manifest")
                elif member.size != sizes[path]:
                    raise IntegrityError(f"{path!r} has {member.size} bytes, but {sizes[path]} are recorded")
                budget.allow(member.size)
                _copy(archive, member, folder / path)
    except IntegrityError as error:
        raise IntegrityError(f"{file}: {str(error).rstrip('.')}.", error.hint) from error
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise IntegrityError(f"{file}: is damaged, or no {SUFFIX} archive of a release.") from error


def _first(archive: tarfile.TarFile, budget: _Budget, folder: Path) -> Manifest:
    member = archive.next()
    if member is None or member.name != MANIFEST_NAME or not member.isreg() or member.issparse():
        raise IntegrityError(f"does not begin with its {MANIFEST_NAME}")
    if member.size > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{MANIFEST_NAME} has {member.size} bytes, far more than any manifest")
    budget.allow(member.size)
    _copy(archive, member, folder / MANIFEST_NAME)
    try:
        return read_manifest(folder).manifest
    except IntegrityError as error:
        raise IntegrityError(str(error).replace(f"{folder}{os.sep}", ""), error.hint) from error


def _check_member(member: tarfile.TarInfo, seen: set[str]) -> str:
    if reason := check_relative_path(member.name):
        raise IntegrityError(f"the path {member.name!r} is not usable: {reason}")
    if not member.isreg() or member.issparse():
        raise IntegrityError(f"{member.name!r} is not a regular file")
    if member.name in seen or member.name == MANIFEST_NAME:
        raise IntegrityError(f"{member.name!r} is there twice")
    seen.add(member.name)
    return member.name


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = archive.extractfile(member)
    if source is None:
        raise IntegrityError(f"{member.name!r} is not a regular file")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as out:
        while data := source.read(_CHUNK):
            out.write(data)


@contextmanager
def _members(file: Path) -> Iterator[tuple[tarfile.TarFile, _Budget]]:
    zstandard = _zstandard()
    try:
        raw = file.open("rb")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    with raw:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        try:
            with decompressor.stream_reader(raw) as stream:
                budget = _Budget(stream)
                with tarfile.open(mode="r|", fileobj=budget) as archive:
                    yield archive, budget
        except zstandard.ZstdError as error:
            raise IntegrityError("is damaged, or not compressed by zstd") from error


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        message = f"{SUFFIX} archives need the package 'zstandard', which is not installed"
        raise RuntimeMissingError(message, 'pip install "qyolo_deploy[bundle]"') from error
    return zstandard
