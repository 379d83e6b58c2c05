"""Reading recipe files: inheritance, `--set`, and errors as one sentence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qyolo_deploy.errors import InputError
from qyolo_deploy.recipe import STORAGE_TAGS, Recipe

_EXPECTED = {
    "model_type": "expected a mapping of keys",
    "dict_type": "expected a mapping of keys",
    "tuple_type": "expected a list",
}


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, merges what it extends and applies `key.path=value` settings.

    Args:
        path: YAML file; `extends: other.yaml` names a recipe beside it whose keys this one overrides.
        settings: From `--set`; values are read as YAML.

    Raises:
        InputError: One sentence that names the file, the key and what was expected.
    """
    data = _read_merged(path, ())
    for setting in settings:
        _apply(data, setting)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(path, error, settings)) from error


def read_mapping(path: Path, kind: str, hint: str | None = None) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: The file.
        kind: What it is called where it is missing.
        hint: What to do then.

    Raises:
        InputError: It is missing, not readable, not YAML, or no mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such {kind}", hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of keys, found {type(data).__name__}")
    return data


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors: what extends another one may leave out what that one has."""
    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "Recipe beside this one to take the rest from"}
    whole = {
        "required": schema.pop("required"),
        "properties": {"data": {"required": schema["$defs"]["DataSection"].pop("required")}},
    }
    schema["anyOf"] = [{"required": ["extends"]}, whole]
    return schema


def _read_merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"{path}: extends itself")
    data = read_mapping(path, "recipe", "`qyolo recipe list` shows those of a folder.")
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise InputError(f"{path}: extends: expected the name of one recipe file")
    return _merge(_read_merged(path.parent / base, (*seen, path.resolve())), data)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_maps = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_maps else value
    return merged


def _apply(data: dict[str, Any], setting: str) -> None:
    dotted, equals, text = setting.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {setting}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {setting}: the value is not valid YAML") from error
    target = data
    for key in keys[:-1]:
        section = target.get(key, {})
        if not isinstance(section, dict):
            raise InputError(f"--set {setting}: '{key}' is a value, not a section")
        # A copy: through a YAML alias, two sections may be one object.
        target[key] = dict(section)
        target = target[key]
    target[keys[-1]] = value


def _explain(path: Path, error: ValidationError, settings: Sequence[str]) -> str:
    """The first of pydantic's errors as one sentence."""
    details = error.errors()
    first = details[0]
    key = ".".join(str(part) for part in first["loc"] if part not in STORAGE_TAGS)
    if first["type"] == "extra_forbidden":
        message = f"unknown key, expected one of {', '.join(_known_keys(first['loc'][:-1]))}"
    elif first["type"] == "missing":
        message = "required key is missing"
    else:
        message = _EXPECTED.get(first["type"], first["msg"].removeprefix("Value error, "))
        if isinstance(first["input"], str | int | float | None):
            message += f", found {first['input']!r}"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{_origin(path, key, settings)}: {message}{more}"


def _origin(path: Path, key: str, settings: Sequence[str]) -> str:
    """The file or the `--set` that a key came from, and the key."""
    for setting in settings:
        dotted = setting.partition("=")[0]
        if dotted == key:
            return f"--set {key}"
        if key and (key.startswith(f"{dotted}.") or dotted.startswith(f"{key}.")):
            return f"--set {dotted}: {key}"
    return f"{path}: {key}" if key else str(path)


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Keys that the section at a location has."""
    model: Any = Recipe
    for part in location:
        fields = {info.alias or name: info.annotation for name, info in model.model_fields.items()}
        model = fields.get(str(part), model)
        if not hasattr(model, "model_fields"):
            return ["the keys of the schema"]
    return [info.alias or name for name, info in model.model_fields.items()]
