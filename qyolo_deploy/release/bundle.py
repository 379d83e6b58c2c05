"""Writing a release folder: copies of every shipped file and the manifest that lists them."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from qyolo_deploy.artifact import FileRecord, check_relative_path
from qyolo_deploy.atomic import atomic_dir
from qyolo_deploy.errors import InputError
from qyolo_deploy.release.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    FileEntry,
    Manifest,
    ReleaseInfo,
    check_unique,
    manifest_to_text,
)
from qyolo_deploy.strict import validation_message


def _check_plan(files: Mapping[str, Path | bytes]) -> None:
    for path, source in files.items():
        if reason := check_relative_path(path):
            raise InputError(f"The release cannot hold {path!r}: {reason}.")
        if path in (MANIFEST_NAME, SIGNATURE_NAME):
            raise InputError(
                f"The release cannot hold a file named {path}: that is its manifest or the signature of it."
            )
        if isinstance(source, Path) and not source.is_file():
            raise InputError(f"{source} is missing, but the release is to ship it as {path!r}.")
    try:
        check_unique(files)
    except ValueError as error:
        raise InputError(f"The release cannot be written: {error}.") from error


def write_release(out: str | os.PathLike[str], files: Mapping[str, Path | bytes], info: ReleaseInfo) -> Path:
    """Copy files into a release folder and write its manifest; the folder appears whole or not at all.

    The same files and the same `info` give the same bytes: nothing records the time.

    Args:
        out: The folder to write; an older one of that name is replaced.
        files: Source file, or content, by its path in the release, with `/` between parts. What a link points to is
            copied, since a release holds no links.
        info: Everything else that the manifest says.

    Returns:
        The release folder.

    Raises:
        InputError: A source is missing, a path is not usable, `info` names a recipe or an engine that is not
            among the files, or the folder cannot be written.
    """
    _check_plan(files)
    target = Path(out)
    with atomic_dir(target) as folder:
        entries = []
        for path in sorted(files):
            copy = folder / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            source = files[path]
            if isinstance(source, bytes):
                copy.write_bytes(source)
            else:
                shutil.copyfile(source, copy)
            entries.append(FileEntry(**asdict(FileRecord.of(folder, path))))
        known = {key: getattr(info, key) for key in type(info).model_fields}
        try:
            manifest = Manifest(files=tuple(entries), **known)
        except ValidationError as error:
            reason = validation_message(error)
            raise InputError(f"The release {target} cannot be written: {reason}.") from error
        (folder / MANIFEST_NAME).write_text(manifest_to_text(manifest), encoding="utf-8")
    return target
