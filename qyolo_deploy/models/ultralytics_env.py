"""Import ultralytics without its side effects on the network, the user's settings and this process."""

import atexit
import importlib
import logging
import os
import shutil
import sys
import tempfile
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch  # noqa: F401  (before ultralytics, which would otherwise leave it with one thread)

_INTEGRATIONS = ("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")


def import_ultralytics() -> ModuleType:
    """Import ultralytics offline and silent, and return its top-level package.

    What ultralytics 8.4 would do by itself and does not after this call: install missing packages,
    look for the network and report usage, write settings under the user's home, download fonts, start
    experiment trackers, log to stdout, leave OMP_NUM_THREADS=1 in the environment, and change how numpy
    prints. A `YOLO_CONFIG_DIR` or `YOLO_VERBOSE` that the user set is kept, and settings files are never
    changed on behalf of this package. Worker processes inherit the environment, so they stay quiet too.
    """
    first = "ultralytics" not in sys.modules
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ.setdefault("YOLO_VERBOSE", "false")
    if first and "YOLO_CONFIG_DIR" not in os.environ:
        os.environ["YOLO_CONFIG_DIR"] = folder = tempfile.mkdtemp(prefix="qyolo-ultralytics-")
        atexit.register(_remove_own_folder, folder, os.getpid())
    threads, cv2_threads = os.environ.get("OMP_NUM_THREADS"), cv2.getNumThreads()
    # As one of several processes it would wait for the others when it is imported; they may import it much later.
    place = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK") if first and name in os.environ}
    try:
        with np.printoptions():
            import ultralytics
    finally:
        os.environ.update(place)
    if first and threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
        cv2.setNumThreads(cv2_threads)
    _quieten()
    return ultralytics


def ensure_torchvision() -> bool:
    """Let ultralytics validate where torchvision is missing or does not fit torch: of it, only suppression is used.

    ultralytics has its own, which it says gives the very same, but asks for the package before it would take it.

    Returns:
        Whether torchvision itself is there.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        suppression: Any = importlib.import_module("ultralytics.utils.nms")
        stand_in: Any = ModuleType("torchvision")
        stand_in.ops = ModuleType("torchvision.ops")
        stand_in.ops.nms = suppression.TorchNMS.nms
        sys.modules["torchvision"] = stand_in
        return False
    return True


def _remove_own_folder(folder: str, owner: int) -> None:
    """Remove the temporary settings folder, unless in a forked worker, which only inherited the handler."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _quieten() -> None:
    """Set in memory what the environment cannot, and all of it if ultralytics was imported before."""
    utils: Any = importlib.import_module("ultralytics.utils")
    checks: Any = importlib.import_module("ultralytics.utils.checks")
    events: Any = importlib.import_module("ultralytics.utils.events")
    utils.AUTOINSTALL = checks.AUTOINSTALL = False
    utils.ONLINE = checks.ONLINE = False
    events.events.enabled = False
    # dict.update, because the settings' own update writes the user's file.
    dict.update(utils.SETTINGS, {"sync": False, "api_key": "", **dict.fromkeys(_INTEGRATIONS, False)})
    os.environ.pop("ULTRALYTICS_API_KEY", None)
    checks.check_font = _no_font
    for handler in utils.LOGGER.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)


def _no_font(font: str = "") -> None:
    """Stand in for the font check, which asks the network for a font that only plots need."""
