"""Module forms of the functions in a traced network, so that every tensor has a producer with a name."""

import torch
from torch import Tensor, nn


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
