"""What a quantized tensor looks like: the grid (`QuantSpec`) and which layer gets which grid (`QuantScheme`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from qyolo_deploy.errors import InputError

Granularity = Literal["per_tensor", "per_channel"]

REDUCED_BITS = 7
"""Of weights whose products with uint8 never saturate: two of them, at most 2 * 255 * 64, fit into 16 bits."""


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one kind of tensor.

    Args:
        bits: Width of the grid, 2 to 8. Says nothing about the container (`storage`).
        signed: Whether the grid is centred on zero.
        narrow_range: Leaves out the lowest level, so that the grid is symmetric.
        granularity: One scale for the tensor or one per slice along `axis`.
        axis: Channel axis of a per-channel grid, None otherwise.

    Raises:
        InputError: For bits outside 2..8 or an axis that does not fit the granularity.
    """

    bits: int
    signed: bool = True
    narrow_range: bool = False
    granularity: Granularity = "per_tensor"
    axis: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"bits is {self.bits}, expected 2 to 8")
        if (self.granularity == "per_channel") != (self.axis is not None):
            raise InputError(f"axis {self.axis} does not fit granularity {self.granularity}")

    @property
    def qmin(self) -> int:
        """The lowest integer of the grid."""
        lowest = -(1 << (self.bits - 1)) if self.signed else 0
        return lowest + int(self.narrow_range)

    @property
    def qmax(self) -> int:
        """The highest integer of the grid."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def to_json(self) -> dict[str, object]:
        """The spec as plain data."""
        return {
            "bits": self.bits,
            "signed": self.signed,
            "narrow_range": self.narrow_range,
            "granularity": self.granularity,
            "axis": self.axis,
        }


@dataclass(frozen=True)
class LayerScheme:
    """Bits of one convolution: its weights and its input activation; None keeps the layer in float."""

    weight_bits: int | None
    activation_bits: int | None


@dataclass(frozen=True)
class QuantScheme:
    """Which grid every convolution gets.

    Args:
        weights: Grid of the weights of ordinary layers.
        activations: Grid of the inputs of ordinary layers. Signed, it makes grids of 8 bits symmetric where integers
            are computed with (see `place`); of fewer bits all grids fit int8 with zero point 0 as they are.
        first_last_bits: Bits of weights and inputs of the first and the last layers.
        overrides: Glob over layer names -> bits of weights and inputs; the last match wins.
        keep_float: Globs over layer names that are not quantized at all.
        offset: Whether unsigned activations have a learned offset (LSQ+); without one values below 0 are lost.
        reduce_range: Whether 8-bit weights use 7 bits, as x86 processors without VNNI need it.
    """

    weights: QuantSpec
    activations: QuantSpec
    first_last_bits: int = 8
    overrides: Mapping[str, LayerScheme] = field(default_factory=dict)
    keep_float: Sequence[str] = ()
    offset: bool = True
    reduce_range: bool = False

    @property
    def label(self) -> str:
        """The usual short name, as in `w4a8`."""
        return f"w{self.weights.bits}a{self.activations.bits}"

    def resolve(self, layers: Sequence[str], ends: Sequence[str]) -> dict[str, LayerScheme]:
        """Gives every layer its bits.

        Args:
            layers: All convolution names, in order of execution.
            ends: The names among them that count as first or last layers.

        Returns:
            Layer name -> its scheme, in the order of `layers`.

        Raises:
            InputError: For a glob that matches no layer.
        """
        globs = [*self.overrides, *self.keep_float]
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in layers):
                raise InputError(
                    f"quant: the glob '{glob}' matches no layer",
                    hint=f"Layers are named like {layers[0]!r} ... {layers[-1]!r}.",
                )
        return {name: self._of_layer(name, name in ends) for name in layers}

    def _of_layer(self, name: str, is_end: bool) -> LayerScheme:
        if any(fnmatchcase(name, glob) for glob in self.keep_float):
            return LayerScheme(None, None)
        chosen = LayerScheme(self.weights.bits, self.activations.bits)
        if is_end:
            chosen = LayerScheme(self.first_last_bits, self.first_last_bits)
        for glob, scheme in self.overrides.items():
            if fnmatchcase(name, glob):
                chosen = scheme
        if self.reduce_range and chosen.weight_bits is not None:
            return LayerScheme(min(chosen.weight_bits, REDUCED_BITS), chosen.activation_bits)
        return chosen
