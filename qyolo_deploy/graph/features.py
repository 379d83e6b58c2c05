"""Outputs of a network's blocks, where a student is compared with its teacher."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, fx, nn

from qyolo_deploy.graph.ops import Concat
from qyolo_deploy.graph.simulate import fold_norms
from qyolo_deploy.graph.trace import trace
from qyolo_deploy.models.base import Detector

# What repeats others' outputs, and convolutions: their values are seen behind batch normalisation or activation.
_UNSEEN = (Concat, nn.Upsample, nn.MaxPool2d, nn.Conv2d)


def block_of(name: str) -> str:
    """The block of a module: the first two parts of its path, such as `model.4`."""
    return ".".join(name.split(".")[:2])


def expose_blocks(traced: fx.GraphModule) -> int:
    """Appends the outputs of all blocks to the network's outputs.

    A block's output is what another block reads of it. What only joins or resizes others' outputs is left out.

    Args:
        traced: A graph of module calls; changed in place.

    Returns:
        The number of raw head maps, which come first.
    """
    modules = dict(traced.named_modules())
    output = traced.graph.output_node()
    maps = tuple(output.args[0])  # type: ignore[arg-type]
    blocks = [
        node
        for node in traced.graph.nodes
        if node.op == "call_module" and not isinstance(modules[node.target], _UNSEEN) and _leaves_block(node)
    ]
    output.args = ((*maps, *blocks),)
    traced.recompile()
    return len(maps)


def _leaves_block(node: fx.Node) -> bool:
    own = block_of(str(node.target))
    return any(user.op == "call_module" and block_of(str(user.target)) != own for user in node.users)


class Teacher(nn.Module):
    """The float network with batch normalisation folded, which tells its raw head maps and its blocks' outputs.

    Args:
        detector: Left as it is.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        core = trace(deepcopy(detector.core).eval())
        self._maps = expose_blocks(core)  # before folding, as `prepare` does: a block may end in batch normalisation
        fold_norms(core)
        self._core = core.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Float32 `[N, 3, H, W]` in 0..1 to raw head maps and block outputs."""
        outputs = self._core(images)
        return outputs[: self._maps], outputs[self._maps :]
