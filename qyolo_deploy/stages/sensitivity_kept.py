"""Numbers of `qyolo sensitivity` that outlast a run which is interrupted."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from qyolo_deploy.artifact import sha256_json
from qyolo_deploy.atomic import write_atomic

MEASURED = "measured.json"


class Kept:
    """What was measured on a model, by what decides it; each number is on the disk before the next one is measured.

    Args:
        path: The file; None keeps nothing. One that is broken or of another model is begun anew.
        model: Digest of the model.
    """

    def __init__(self, path: Path | None, model: str) -> None:
        self._path, self._model = path, model
        self._numbers = {} if path is None else _read(path, model)

    def number(self, decides: object, measure: Callable[[], float]) -> float:
        """A number that is known, or is measured now.

        Args:
            decides: Plain data that, with the model, decides the number.
            measure: Called where it is not known.

        Raises:
            InputError: The file cannot be written.
        """
        key = sha256_json(decides)
        if key not in self._numbers:
            self._numbers[key] = measure()
            if self._path is not None:
                write_atomic(self._path, json.dumps({"model": self._model, "numbers": self._numbers}, indent=0))
        return self._numbers[key]


def _read(path: Path, model: str) -> dict[str, float]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["model"] != model:
            return {}
        numbers = {str(key): float(value) for key, value in content["numbers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}
