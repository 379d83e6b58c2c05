"""Writing files and folders that appear whole or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from qyolo_deploy.errors import InputError

_SPACE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


@contextlib.contextmanager
def _explained(path: Path, only: set[int] | None = None) -> Iterator[None]:
    """Turn an operating system's refusal to write `path` into an `InputError`."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        reason = error.strerror or type(error).__name__
        hint = "Free some space or name a folder that can be written."
        raise InputError(f"{path} cannot be written: {reason}.", hint) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """Name an unused sibling of `path`; it keeps the suffix, which some writers choose their format by."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}.{secrets.token_hex(6)}.partial{path.suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path for a file that takes the name `path` once the block ends without an error.

    The temporary name lies in the same folder (made where absent) and has the same suffix. After an error
    nothing is left and an older file of that name is untouched.

    Raises:
        InputError: The folder cannot be written or the disk is full.
    """
    target = Path(path)
    temporary = _temporary(target)
    try:
        with _explained(target, _SPACE_ERRORS):
            yield temporary
            _fsync(temporary)
        with _explained(target):
            temporary.replace(target)
            _fsync(target.parent)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that takes the name `path` once the block ends without an error.

    POSIX cannot replace a folder that holds files in one step. An older folder is therefore moved aside, the
    new one moved in, and only then the older one removed; if the second move fails, the first is undone.

    Raises:
        InputError: The folder cannot be written or the disk is full.
    """
    target = Path(path)
    temporary = _temporary(target)
    aside = _temporary(target)
    try:
        with _explained(target):
            temporary.mkdir()
        with _explained(target, _SPACE_ERRORS):
            yield temporary
            for entry in (*temporary.rglob("*"), temporary):
                if not entry.is_symlink():
                    _fsync(entry)
        with _explained(target):
            _swap_in(temporary, target, aside)
            _fsync(target.parent)
    finally:
        _remove(temporary)
        if target.exists():
            _remove(aside)


def _swap_in(temporary: Path, target: Path, aside: Path) -> None:
    had_older = target.is_symlink() or target.exists()
    if had_older:
        target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        if had_older:
            aside.rename(target)
        raise


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a whole file (text as UTF-8) so that a reader finds the older or the newer one, never a part.

    Raises:
        InputError: The folder cannot be written or the disk is full.
    """
    payload = data.encode() if isinstance(data, str) else data
    with atomic_path(path) as temporary, _explained(Path(path)):
        temporary.write_bytes(payload)
