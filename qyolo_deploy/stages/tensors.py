"""What looking inside a view means: the tensors it has, their grids, and their values for images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.validate.parity import Grid, TensorErrors

_INPUT = "images"

Tensors = dict[str, NDArray[np.float32]]
Watch = Callable[[NDArray[np.float32]], Tensors]


class TensorSource(Protocol):
    """A view of a model whose inner tensors can be seen.

    Attributes:
        label: What messages and tables call it.
        names: Of its tensors, which are those of the modules that make them.
        in_order: Whether the names come in the order of the network.
        grids: Grid of each tensor that is rounded.
        imgsz: Height and width if they are fixed, else None.
        trained_imgsz: The longer side that it was made for, if it is known.
        intact_db: See `Parity`; of the first image.
    """

    label: str
    names: Sequence[str]
    in_order: bool
    grids: Mapping[str, Grid]
    imgsz: tuple[int, int] | None
    trained_imgsz: int | None
    intact_db: float

    def watch(self, names: Sequence[str]) -> Watch:
        """Function from images float32 `[N, 3, H, W]` in 0..1 to these tensors as their readers see them."""


def intact_db(looking: Sequence[NDArray[np.float32]], plain: Sequence[NDArray[np.float32]]) -> float:
    """SQNR of a view's outputs while it is looked into, in dB."""
    outputs = TensorErrors("outputs", None, None)
    for one, other in zip(plain, looking, strict=True):
        outputs.add(one, other)
    return outputs.result().sqnr_db


def is_module(name: str) -> bool:
    """Whether a tensor is named after the module that makes it, or is the image; decoding has other names."""
    return "." in name or name == _INPUT
