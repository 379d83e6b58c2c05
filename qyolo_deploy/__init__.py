"""From float YOLO weights to low-bit engines for edge devices, with the accuracy proven on the engine that ships.

The functions behind the commands, imported when they are first used:

* `build(recipe, settings=(), data=None, out="runs")`: recipe to release.
* `run_matrix(file)`: many builds of one recipe as a table.
* `validate(engine, data)`: COCO mAP and latency of any engine file.
* `compare(one_view, other_view, data)`: two views of a model tensor by tensor.
* `sensitivity(build, data)`: what the quantization of each tensor alone costs.
* `verify_release(path)`: proof that a release is whole and unchanged.
* `create_calibration_set(data, out, CalibrationChoice(images=128))`, `verify_calibration_set(path, data)`,
  `read_calibration_set(path)`: calibration subsets as data.
* `check_runtimes()`: what this machine can build and run.
* `load_recipe(path)`, `recipe_schema()`: recipes.
"""

import os
from importlib import import_module
from typing import Any

from qyolo_deploy._version import __version__

# The wheels of ONNX Runtime 1.31 report usage over the network and write a device id into the user's cache, from
# their first import on, unless this is set before it. Who wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "build": "qyolo_deploy.pipeline",
    "BuildResult": "qyolo_deploy.pipeline",
    "run_matrix": "qyolo_deploy.matrix.run",
    "validate": "qyolo_deploy.validate.run",
    "EvalReport": "qyolo_deploy.validate.report",
    "compare": "qyolo_deploy.stages.compare",
    "sensitivity": "qyolo_deploy.stages.sensitivity",
    "Parity": "qyolo_deploy.validate.parity",
    "verify_release": "qyolo_deploy.release.verify",
    "create_calibration_set": "qyolo_deploy.stages.calibration",
    "verify_calibration_set": "qyolo_deploy.stages.calibration",
    "CalibrationChoice": "qyolo_deploy.stages.calibration",
    "CalibrationSet": "qyolo_deploy.data.calibration",
    "read_calibration_set": "qyolo_deploy.data.calibration",
    "check_runtimes": "qyolo_deploy.doctor",
    "load_recipe": "qyolo_deploy.recipe_file",
    "recipe_schema": "qyolo_deploy.recipe_file",
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
