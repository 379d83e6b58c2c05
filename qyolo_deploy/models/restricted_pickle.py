"""Read PyTorch checkpoints without importing or running anything that they name."""

import io
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qyolo_deploy.errors import InputError

_TORCH_LAYERS = {
    "activation": "SiLU ReLU ReLU6 LeakyReLU Hardswish Mish GELU Sigmoid",
    "batchnorm": "BatchNorm2d",
    "container": "Sequential ModuleList",
    "conv": "Conv2d ConvTranspose2d",
    "linear": "Identity",
    "loss": "BCEWithLogitsLoss",
    "padding": "ZeroPad2d",
    "pooling": "MaxPool2d AvgPool2d AdaptiveAvgPool2d",
    "upsampling": "Upsample",
}
_ULTRALYTICS_LAYERS = """
A2C2f AAttn ABlock AConv ADown AIFI Attention Bottleneck BottleneckCSP C1 C2 C2PSA C2f C2fCIB C2fPSA C3
C3Ghost C3k C3k2 C3x CBFuse CBLinear CIB Concat Conv Conv2 ConvTranspose DFL DWConv DWConvTranspose2d Detect
ELAN1 Focus GhostBottleneck GhostConv MLPBlock PSA PSABlock RepBottleneck RepC3 RepCSP RepConv RepNCSPELAN4
RepVGGDW SCDown SPP SPPELAN SPPF Silence TransformerBlock TransformerLayer v10Detect
"""
# Names only: each is replaced by a stub, and the class itself is never looked up.
MODULES = frozenset(
    [f"torch.nn.modules.{file}.{name}" for file, names in _TORCH_LAYERS.items() for name in names.split()]
    + [f"models.common.{name}" for name in ("Bottleneck", "C3", "Concat", "Conv", "DWConv", "SPP", "SPPF")]
    + [f"models.yolo.{name}" for name in ("Detect", "DetectionModel", "Model")]
    + [
        f"ultralytics.nn.modules{file}.{name}"
        for file in ("", ".block", ".conv", ".head", ".transformer")
        for name in _ULTRALYTICS_LAYERS.split()
    ]
    + [f"ultralytics.nn.tasks.{name}" for name in ("DetectionModel", "YOLOv10DetectionModel")]
)
VALUES = frozenset(
    [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
    + ["numpy.dtype", "numpy.ndarray"]
    + [f"pathlib{local}.{name}" for local in ("", "._local") for name in ("PosixPath", "WindowsPath")]
    + ["ultralytics.utils.IterableSimpleNamespace", "ultralytics.yolo.utils.IterableSimpleNamespace"]
    + [f"ultralytics.utils.loss.{name}" for name in ("v8DetectionLoss", "E2ELoss", "E2EDetectLoss", "v10DetectLoss")]
    + [f"ultralytics.utils.loss.{name}" for name in ("BboxLoss", "DFLoss")]
    + ["ultralytics.utils.tal.TaskAlignedAssigner"]
)
_YOLOV7 = frozenset(("models.common.MP", "models.common.SPPCSPC", "models.common.SP", "models.yolo.IDetect"))
# What torch's unpickler raises for streams that are cut off or nonsense.
_MALFORMED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class _SurprisingCallError(Exception):
    """A pickle uses an allowed name in a way that no checkpoint does."""


class ModuleStub:
    """Stands for a pickled module: keeps the state that it was saved with and can do nothing.

    Attributes:
        path: The dotted name of the class that was pickled.
        state: The module's `__dict__`, with `_modules`, `_parameters` and `_buffers`.
    """

    path = ""
    state: dict[str, Any]

    def __new__(cls, *arguments: Any) -> "ModuleStub":
        """Make an empty stub; modules are pickled without constructor arguments."""
        if arguments:
            raise _SurprisingCallError(f"it calls {cls.path} with arguments")
        stub = super().__new__(cls)
        stub.state = {}
        return stub

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise _SurprisingCallError(f"it sets {self.path} to something that is not a module's state")
        self.state = state


class ValueStub:
    """Stands for a harmless object whose value is of no use here, such as a path or a NumPy scalar."""

    def __new__(cls, *arguments: Any) -> "ValueStub":
        """Make the stub and drop the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def load_stubs(data: bytes, label: str) -> Any:
    """Unpickle a checkpoint of `torch.save` with every class in it replaced by an inert stub.

    Args:
        data: The file's content.
        label: How messages name the file.

    Raises:
        InputError: The file is no such archive, is damaged, or names anything that is not on the list.
    """
    _check_container(data, label)
    with _no_other_globals():
        needed = _globals(data, label)
        _check_globals(needed, label)
        stubs: list[Any] = [
            (type("Stub", (ModuleStub if name in MODULES else ValueStub,), {"path": name}), name) for name in needed
        ]
        try:
            with torch.serialization.safe_globals(stubs):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except _SurprisingCallError as error:
            raise InputError(f"The checkpoint {label} is refused: {error}, which no checkpoint does.") from error
        except _MALFORMED as error:
            raise _damaged(label, error) from error


def _check_container(data: bytes, label: str) -> None:
    """Tell apart what people take for checkpoints: web pages, LFS pointers, old and cut-off files."""
    start = data[:64].lstrip().lower()
    if not data:
        reason = "is empty"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        reason = "is a web page and not a checkpoint: the download went wrong"
    elif start.startswith(b"version https://git-lfs"):
        reason = "is a Git LFS pointer and not the checkpoint itself"
    elif data[:1] == b"\x80":
        reason = "is in the pickle format of PyTorch before 1.6, which is not read"
    elif not data.startswith(b"PK\x03\x04"):
        reason = "is not a checkpoint of torch.save"
    else:
        return
    raise InputError(f"The checkpoint {label} {reason}.")


@contextmanager
def _no_other_globals() -> Iterator[None]:
    """Hide classes that other code in this process has declared safe, since those would be run."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _globals(data: bytes, label: str) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except ValueError as error:
        if "torchscript" in str(error):
            raise InputError(
                f"The checkpoint {label} is a TorchScript archive; expected a training checkpoint."
            ) from error
        raise _damaged(label, error) from error
    except _MALFORMED as error:
        raise _damaged(label, error) from error


def _check_globals(needed: list[str], label: str) -> None:
    """Refuse names that are not on the list, first those that no architecture explains."""
    unknown = [name for name in needed if name not in MODULES and name not in VALUES]
    layers = [name for name in unknown if name.startswith(("models.", "torch.nn.modules.", "ultralytics.nn."))]
    layers.sort(key=lambda name: not name.endswith("Model"))
    # Checkpoints of other tasks pickle bound methods through getattr: name the task and not getattr.
    foreign = [name for name in unknown if name not in layers and not (layers and name == "builtins.getattr")]
    if foreign:
        raise InputError(
            f"The checkpoint {label} asks for {foreign[0]}, which has no place in a detection checkpoint; "
            "nothing of it was run.",
            hint="Take the file from a source that you trust, or save the plain model again.",
        )
    if _YOLOV7.intersection(layers):
        raise InputError(f"The checkpoint {label} is a YOLOv7, which is not supported yet.")
    if layers:
        raise InputError(
            f"The checkpoint {label} holds {layers[0]}, which no supported detection architecture has.",
            hint="Supported are detection models of YOLOv5 (releases 6 and 7) and of ultralytics.",
        )


def _damaged(label: str, error: BaseException) -> InputError:
    first = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    return InputError(f"The checkpoint {label} is truncated or damaged ({first}).")
