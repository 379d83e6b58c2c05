"""Parity by layer: how far the same tensors of two views of a model lie apart, summed up image by image."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.errors import InputError

EXACT_DB = 200.0
"""Stands for tensors that do not differ at all, whose SQNR would be infinite; float32 tells about 150 dB apart."""

DEFAULT_THRESHOLD_DB = 20.0
"""Below it, noise is more than a tenth of the signal."""

_SAME_SCALE = 1e-4  # runtimes that write ranges instead of scales lose a few of a float's last bits


@dataclass(frozen=True)
class Grid:
    """The values that a tensor can have: `scale * step` for whole steps from low to high.

    Steps are codes without their zero point, so they are the same in every container.
    """

    scale: float
    low: int
    high: int

    def steps(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Float32 of any shape to whole steps of the same shape."""
        nearest = np.rint(values / np.float32(self.scale))
        return np.asarray(np.clip(nearest, self.low, self.high), np.float32)

    def is_like(self, other: "Grid") -> bool:
        """Whether both have the same steps, up to the last bits of the scale."""
        return math.isclose(self.scale, other.scale, rel_tol=_SAME_SCALE)


@dataclass(frozen=True)
class TensorParity:
    """How far one tensor of two views lies apart.

    Attributes:
        name: Of the module that makes the tensor.
        sqnr_db: Power of the reference over that of the difference; `EXACT_DB` where nothing differs.
        cosine: Of the angle between the two, as vectors.
        max_error: Largest absolute difference.
        max_error_steps: The same in quantization steps; None without a common grid.
        differing: Share of values whose codes differ; None without a common grid.
        values: How many were compared.
    """

    name: str
    sqnr_db: float
    cosine: float
    max_error: float
    max_error_steps: float | None
    differing: float | None
    values: int


@dataclass(frozen=True)
class Parity:
    """Two views tensor by tensor, in order of execution.

    Attributes:
        reference: What the first view is called.
        compared: What the second is called.
        images: How many were compared.
        layers: The tensors that both have.
        both_quantized: Whether the two are integers of the same grids: their codes tell where they depart then, else
            their SQNR.
        threshold_db: Below it a tensor departs, where not both are quantized.
        only: View -> names of the quantized tensors that the other does not have or does not round.
        intact_db: View -> SQNR of its outputs while it was looked into against those without; `EXACT_DB` is as it
            should be.
    """

    reference: str
    compared: str
    images: int
    layers: tuple[TensorParity, ...]
    both_quantized: bool
    threshold_db: float
    only: Mapping[str, tuple[str, ...]]
    intact_db: Mapping[str, float]

    @property
    def first_departure(self) -> TensorParity | None:
        """The first tensor whose codes differ, or whose SQNR is below the threshold where there is a float view.

        What a SiLU reads does not count for the latter: ranges may cut off what SiLU makes zero of anyway.
        """
        if self.both_quantized:
            return next((layer for layer in self.layers if self._codes_differ(layer)), None)
        inside = self._inside_activations()
        return next((layer for layer in self.layers if self._is_noisy(layer) and layer.name not in inside), None)

    @property
    def largest_drop(self) -> tuple[TensorParity, float] | None:
        """The tensor that loses most SQNR to the one before it, not counting what is inside SiLU, and how many dB."""
        inside = self._inside_activations()
        counted = [layer for layer in self.layers if layer.name not in inside]
        pairs = pairwise(counted)
        drops = [(after, before.sqnr_db - after.sqnr_db) for before, after in pairs]
        largest = max(drops, key=lambda drop: drop[1], default=None)
        return largest if largest is not None and largest[1] > 0 else None

    def _inside_activations(self) -> frozenset[str]:
        """Inputs and sigmoids of SiLUs, by the names and the order that tracing gives them."""
        names = [layer.name for layer in self.layers]
        gates = [i for i, name in enumerate(names) if name.removesuffix("sigmoid") + "mul" in names[i:]]
        return frozenset(names[place] for gate in gates for place in (gate - 1, gate) if place >= 0)

    def _codes_differ(self, layer: TensorParity) -> bool:
        return layer.differing > 0 if layer.differing is not None else self._is_noisy(layer)

    def _is_noisy(self, layer: TensorParity) -> bool:
        return layer.sqnr_db < self.threshold_db

    def summary(self) -> dict[str, float]:
        """The numbers that gates ask for: `images`, `min_sqnr_db` and, where there are codes, `differing`."""
        found: dict[str, float] = {"images": self.images, "min_sqnr_db": min(layer.sqnr_db for layer in self.layers)}
        counted = [(layer.differing, layer.values) for layer in self.layers if layer.differing is not None]
        if counted:
            found["differing"] = sum(share * n for share, n in counted) / sum(n for _, n in counted)
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data, layers in order of execution."""
        first, drop = self.first_departure, self.largest_drop
        return {
            "reference": self.reference,
            "compared": self.compared,
            **self.summary(),
            "first_departure": None if first is None else first.name,
            "largest_drop": None if drop is None else {"name": drop[0].name, "drop_db": drop[1]},
            "both_quantized": self.both_quantized,
            "threshold_db": self.threshold_db,
            "only": {view: list(names) for view, names in self.only.items()},
            "intact_db": dict(self.intact_db),
            "layers": [asdict(layer) for layer in self.layers],
        }


class TensorErrors:
    """Sums over images what one tensor's parity is made of; it takes no more memory for more images.

    Args:
        name: Of the tensor.
        reference: Grid of the first view's values, None where it is float.
        compared: Grid of the second view's values.
    """

    def __init__(self, name: str, reference: Grid | None, compared: Grid | None) -> None:
        self.name = name
        # A float view's values have the codes that the other's grid would give them.
        self._grid = reference or compared
        if reference is not None and compared is not None and not reference.is_like(compared):
            self._grid = None
        self._signal = self._noise = self._power = self._product = self._largest = 0.0
        self._values = self._differing = 0

    def add(self, reference: NDArray[np.float32], compared: NDArray[np.float32]) -> None:
        """Takes the tensor of another image.

        Raises:
            InputError: If the shapes differ.
        """
        if reference.shape != compared.shape:
            shapes = f"{list(reference.shape)} and {list(compared.shape)}"
            raise InputError(f"the tensor '{self.name}' has the shapes {shapes}, expected two views of one model")
        left, right = reference.ravel(), compared.ravel()
        difference = left - right
        self._signal += _dot(left, left)
        self._power += _dot(right, right)
        self._product += _dot(left, right)
        self._noise += _dot(difference, difference)
        self._largest = max(self._largest, float(np.abs(difference).max(initial=0)))
        self._values += left.size
        if self._grid is not None:
            self._differing += int((self._grid.steps(left) != self._grid.steps(right)).sum())

    def result(self) -> TensorParity:
        """What has come together so far."""
        steps = None if self._grid is None else self._largest / self._grid.scale
        return TensorParity(
            name=self.name,
            sqnr_db=sqnr_db(self._signal, self._noise),
            cosine=self._cosine(),
            max_error=self._largest,
            max_error_steps=steps,
            differing=None if self._grid is None else self._differing / max(self._values, 1),
            values=self._values,
        )

    def _cosine(self) -> float:
        lengths = math.sqrt(self._signal) * math.sqrt(self._power)
        if lengths == 0:
            return float(self._signal == self._power)
        return max(-1.0, min(1.0, self._product / lengths))


def sqnr_db(signal: float, noise: float) -> float:
    """Ratio of two powers in dB, within `EXACT_DB` of 0, so that it is always a number."""
    if noise == 0:
        return EXACT_DB
    if signal == 0:
        return -EXACT_DB
    return max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(signal / noise)))


def _dot(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """In float64, as the sum of millions of squares in float32 would lose the small ones."""
    return float(np.einsum("i,i->", left, right, dtype=np.float64, casting="same_kind"))
