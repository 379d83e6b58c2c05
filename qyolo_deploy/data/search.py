"""Where data and weights that a recipe names are looked for."""

import os
from pathlib import Path

from qyolo_deploy.errors import InputError

DATA_VARIABLE = "QYOLO_DATA"


def find_input(name: str | Path, beside: Path | None = None, what: str = "dataset") -> Path:
    """Find a file or folder as given, then beside the recipe, then under `$QYOLO_DATA`.

    Args:
        name: Path as the user wrote it.
        beside: The recipe, or its folder.
        what: What is being looked for, for the message.

    Raises:
        InputError: It is in none of these places; all are named.
    """
    path = Path(name).expanduser()
    places = [path]
    if not path.is_absolute():
        places[0] = Path.cwd() / path
        if beside is not None:
            places.append((beside.parent if beside.is_file() else beside).absolute() / path)
        if data := os.environ.get(DATA_VARIABLE):
            places.append(Path(data).expanduser() / path)
    for place in places:
        if place.exists():
            return place
    searched = ", ".join(str(place) for place in dict.fromkeys(places))
    hint = f"Give its path, or set {DATA_VARIABLE} to the folder that holds it."
    raise InputError(f"{what} {str(name)!r} was not found; searched: {searched}", hint=hint)
