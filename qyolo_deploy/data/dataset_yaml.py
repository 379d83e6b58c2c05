"""Dataset YAML files in the layout of ultralytics: where the images of a split are, and the class names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qyolo_deploy.data.images import list_images
from qyolo_deploy.data.search import find_input
from qyolo_deploy.errors import InputError

_NOT_SPLITS = frozenset({"path", "names", "nc", "download", "yaml_file", "channels"})


@dataclass(frozen=True)
class SplitImages:
    """The images of one split, and whether they were picked from a list instead of whole folders."""

    root: Path
    paths: tuple[Path, ...]
    listed: bool


def read_dataset_yaml(file: Path, split: str) -> tuple[tuple[str, ...], SplitImages]:
    """Read the class names and the images of one split.

    Raises:
        InputError: The file is unreadable, a key is missing or wrong, or the split has no images.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: the dataset file does not exist") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: the dataset file is not readable YAML ({reason})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: a dataset file must be a mapping with 'names' and a key for every split")
    names = _class_names(file, content)
    root = _root(file, content.get("path"))
    if content.get(split) is None or split in _NOT_SPLITS:
        splits = [key for key in content if key not in _NOT_SPLITS and content[key] is not None]
        raise InputError(f"{file}: there is no split '{split}', only {', '.join(map(str, splits)) or 'none'}")
    return names, _split_images(file, root, split, content[split])


def _class_names(file: Path, content: dict[str, Any]) -> tuple[str, ...]:
    names = content.get("names")
    if names is None:
        raise InputError(f"{file}: the key 'names' (the class names) is missing")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise InputError(f"{file}: the keys of 'names' must be 0..{len(names) - 1}, each once")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise InputError(f"{file}: 'names' must be a list of class names, or a mapping from number to name")
    if not names:
        raise InputError(f"{file}: the list of classes ('names') is empty")
    result = tuple(str(name).strip() for name in names)
    if len(set(result)) < len(result):
        raise InputError(f"{file}: 'names' holds a class name twice")
    if content.get("nc", len(result)) != len(result):
        raise InputError(f"{file}: 'nc' is {content['nc']}, but 'names' has {len(result)} classes")
    return result


def _root(file: Path, path: object) -> Path:
    if path is None:
        return file.parent
    if not isinstance(path, str):
        raise InputError(f"{file}: 'path' must be the folder of the dataset, not {path!r}")
    # First beside the file: 'path: .' should not depend on where the command was started.
    beside = file.parent / Path(path).expanduser()
    return beside if beside.exists() else find_input(path, file.parent, what=f"{file}: the folder 'path'")


def _split_images(file: Path, root: Path, split: str, value: object) -> SplitImages:
    entries = value if isinstance(value, list) else [value]
    paths: list[Path] = []
    listed = False
    for entry in entries:
        if not isinstance(entry, str):
            raise InputError(f"{file}: '{split}' must be a folder, a .txt list of images, or a list of those")
        place = _place(root, entry)
        if place.is_dir():
            paths += list_images(place)
        elif place.suffix == ".txt" and place.is_file():
            listed = True
            paths += _read_list(place, root)
        else:
            raise InputError(f"{file}: '{split}' names {place}, which is neither a folder nor a .txt list of images")
    if not paths:
        raise InputError(f"{file}: the split '{split}' is empty, there is no image in {', '.join(map(str, entries))}")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise InputError(f"{file}: the split '{split}' names the image {twice} twice")
    return SplitImages(root, tuple(paths), listed)


def _place(root: Path, entry: str) -> Path:
    place = root / Path(entry).expanduser()
    # Exports often say '../train/images' of a folder beside the YAML; ultralytics reads them so too.
    if not place.exists() and entry.startswith("../") and (root / entry[3:]).exists():
        return root / entry[3:]
    return place


def _read_list(file: Path, root: Path) -> list[Path]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: the list of images cannot be read ({error})") from error
    paths = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        candidates = (file.parent / line.strip(), root / line.strip())
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is None:
            raise InputError(f"{file}, line {number}: the image {candidates[0]} does not exist")
        paths.append(path)
    return paths
