"""From float YOLO weights to low-bit engines for edge devices, with the accuracy proven on the engine that ships.

The functions behind the commands, imported when they are first used:

* `build(recipe, settings=(), data=None, out="runs")`: recipe to release.
* `validate(engine, data)`: COCO mAP and latency of any engine file.
* `verify_release(path)`: proof that a release is whole and unchanged.
* `check_runtimes()`: what this machine can build and run.
* `load_recipe(path)`, `recipe_schema()`: recipes.
"""

from importlib import import_module
from typing import Any

from qyolo_deploy._version import __version__

_HOMES = {
    "build": "qyolo_deploy.pipeline",
    "BuildResult": "qyolo_deploy.pipeline",
    "validate": "qyolo_deploy.validate.run",
    "EvalReport": "qyolo_deploy.validate.report",
    "verify_release": "qyolo_deploy.release.verify",
    "check_runtimes": "qyolo_deploy.doctor",
    "load_recipe": "qyolo_deploy.recipe",
    "recipe_schema": "qyolo_deploy.recipe",
    "Recipe": "qyolo_deploy.recipe",
    "QuantizedModel": "qyolo_deploy.quant.model",
    "QyoloError": "qyolo_deploy.errors",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qyolo_deploy' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
