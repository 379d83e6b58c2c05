"""The report of the last release, which gates compare with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qyolo_deploy.errors import InputError

_REPORT = "report.json"


def report_of_release(release: Path) -> Path:
    """The report's file: the path itself, or the one in the folder.

    Raises:
        InputError: There is none.
    """
    file = release / _REPORT if release.is_dir() else release
    if not file.is_file():
        raise InputError(f"{release}: expected a release folder with {_REPORT}, or such a file")
    return file


def read_release(release: Path) -> dict[str, Mapping[str, Any]]:
    """The views in the report of a release, by name.

    Raises:
        InputError: There is no report, or it is none.
    """
    file = report_of_release(release)
    try:
        views = json.loads(file.read_text(encoding="utf-8"))["views"]
        return {str(view["name"]): view for view in views}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not the report of a build, the list 'views' is missing or broken") from error
