"""Module forms of the functions in a traced network, so that every tensor has a producer with a name."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

REARRANGING = frozenset(["contiguous", "flatten", "permute", "reshape", "transpose", "view"])
_SPLITTING = frozenset(["chunk", "split"])


class Add(nn.Module):
    """Elementwise sum of two tensors (a residual connection)."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Adds tensors of one shape."""
        return left + right


class Mul(nn.Module):
    """Elementwise product, the second half of SiLU."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiplies tensors of one shape."""
        return left * right


class Concat(nn.Module):
    """Concatenation along one axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *parts: Tensor) -> Tensor:
        """Joins the parts."""
        return torch.cat(parts, self.dim)


class Rearrange(nn.Module):
    """A method of tensors that puts the same values into another shape or order.

    Args:
        method: Its name, such as `reshape`.
    """

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """Calls the method with the arguments."""
        result: Tensor = getattr(x, self.method)(*arguments)
        return result


def call_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls."""
    return "getitem" if node.target is operator.getitem else str(getattr(node.target, "__name__", node.target))


def only_repeats(node: fx.Node) -> bool:
    """Whether a node that calls a plain function gives nothing but values of its first argument."""
    if node.op not in ("call_function", "call_method") or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is operator.getitem:  # a part of a split tensor, not a number of a shape
        return call_name(node.args[0]) in _SPLITTING
    return call_name(node) in REARRANGING | _SPLITTING
