"""What a QDQ graph says, computed with numpy alone: integers where it has integers, float64 for all else.

Nothing here is shared with the package: weights, scales, zero points and operators are read from the ONNX file. A
convolution is a sum of products of integers, which must fit the int32 accumulator; the sum times its scales is exact
but for the last bits of float64, and is rounded half to even. Runtimes round that product to float32 before they round
it to a code, so at a tie they may choose the code beside it; `distance` tells how far from a tie that happened.
"""

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import numpy_helper

INT32 = 2**31 - 1


class IntegerReference:
    """An interpreter of the part of a QDQ graph that comes before decoding.

    Args:
        model: `onnx.ModelProto` with the placement of this package.
    """

    def __init__(self, model):
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.rounded = {
            node.output[0].removesuffix(".dequantized"): node
            for node in model.graph.node
            if node.op_type == "DequantizeLinear" and node.output[0].endswith(".dequantized")
        }

    def grid(self, name):
        """Scale as float64, zero point, and the lowest and highest code of a rounded tensor."""
        node = self.rounded[name]
        scale, zero_point = (self.constants[key] for key in node.input[1:3])
        limits, clip = np.iinfo(zero_point.dtype), self.makers[node.input[0]]
        low = int(self.constants[clip.input[1]]) if clip.op_type == "Clip" else limits.min
        return float(scale), int(zero_point), low, limits.max

    def positions(self, name, codes, images):
        """Where a rounded tensor lies on its grid before it is rounded: float64, in codes, clipped to the grid.

        Args:
            name: Of the tensor.
            codes: Rounded tensor -> its integers, for tensors that are known. Others are computed, and added.
            images: float32 `[N, 3, H, W]`.
        """
        scale, zero_point, low, high = self.grid(name)
        node = self.makers[self.rounded[name].input[0]]
        node = self.makers[node.input[0]] if node.op_type == "Clip" else node
        return np.clip(self._real(node.input[0], codes, images) / scale + zero_point, low, high)

    def codes(self, name, codes, images):
        """The integers of a rounded tensor, known or computed."""
        if name not in codes:
            codes[name] = np.rint(self.positions(name, codes, images)).astype(np.int32)
        return codes[name]

    def _real(self, name, codes, images):
        """A tensor before rounding, float64."""
        if name == "images":
            return images.astype(np.float64)
        if name in self.constants:
            return self.constants[name].astype(np.float64)
        if (tensor := name.removesuffix(".dequantized")) in self.rounded and tensor != name:
            scale, zero_point, _, _ = self.grid(tensor)
            return (self.codes(tensor, codes, images) - zero_point) * scale
        node = self.makers[name]
        if node.op_type == "Split":
            whole = self._real(node.input[0], codes, images)
            sizes = self.constants[node.input[1]] if len(node.input) > 1 else [whole.shape[1] // len(node.output)] * 2
            return np.split(whole, np.cumsum(sizes)[:-1], 1)[list(node.output).index(name)]
        compute = getattr(self, f"_{node.op_type.lower()}")
        return compute(node, codes, images)

    def all_codes(self, images):
        """The integers of all rounded tensors, from the images alone."""
        codes = {}
        for name in self.rounded:  # in the order of the graph, so that none has far to go back
            self.codes(name, codes, images)
        return codes

    def _inputs(self, node, codes, images):
        return [self._real(name, codes, images) for name in node.input if name]

    def _conv(self, node, codes, images):
        facts = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        source, weight, bias = node.input
        if source.removesuffix(".dequantized") not in self.rounded or weight not in self.makers:
            x, w, b = self._inputs(node, codes, images)  # a layer that stays float
            return convolve(x, w, facts) + b[:, None, None]
        tensor = source.removesuffix(".dequantized")
        scale, zero_point, _, _ = self.grid(tensor)
        weights, bias_integers = self._integers(weight), self._integers(bias)
        sums = convolve(self.codes(tensor, codes, images) - zero_point, weights, facts) + bias_integers[:, None, None]
        assert np.abs(sums).max() <= INT32  # or the accumulator of the kernels would overflow
        scales = self.constants[self.makers[weight].input[1]].astype(np.float64)
        return sums * (scale * scales)[:, None, None]

    def _integers(self, dequantized):
        """Weights or biases, also such as are stored in 4 bits."""
        name = self.makers[dequantized].input[0]
        if name in self.makers:
            name = self.makers[name].input[0]
        return self.constants[name].astype(np.int64)

    def _sigmoid(self, node, codes, images):
        (x,) = self._inputs(node, codes, images)
        return 1 / (1 + np.exp(-x))

    def _mul(self, node, codes, images):
        left, right = self._inputs(node, codes, images)
        return left * right

    def _add(self, node, codes, images):
        left, right = self._inputs(node, codes, images)
        return left + right

    def _concat(self, node, codes, images):
        return np.concatenate(self._inputs(node, codes, images), 1)

    def _clip(self, node, codes, images):
        x, *ends = self._inputs(node, codes, images)
        return np.clip(x, *ends)

    def _identity(self, node, codes, images):
        (x,) = self._inputs(node, codes, images)
        return x

    def _maxpool(self, node, codes, images):
        (x,) = self._inputs(node, codes, images)
        facts = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        (size, _), (step, _), pads = facts["kernel_shape"], facts["strides"], facts["pads"]
        padded = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])], constant_values=-np.inf)
        return sliding_window_view(padded, (size, size), (2, 3))[:, :, ::step, ::step].max((-1, -2))

    def _resize(self, node, codes, images):
        """Nearest, twice the size."""
        x = self._real(node.input[0], codes, images)
        assert self.constants[node.input[2]].tolist() == [1, 1, 2, 2]
        return x.repeat(2, 2).repeat(2, 3)


def convolve(x, weight, facts):
    """Sums of products, exact for integers; float64 `[N, C_out, H', W']`.

    Args:
        x: `[N, C_in, H, W]`.
        weight: `[C_out, C_in / groups, kH, kW]`.
        facts: The node's attributes.
    """
    assert set(facts.get("dilations", [1])) == {1}
    top, left, bottom, right = facts.get("pads", [0, 0, 0, 0])
    groups, (step, _) = facts.get("group", 1), facts.get("strides", [1, 1])
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (top, bottom), (left, right)])
    windows = sliding_window_view(padded, weight.shape[2:], (2, 3))[:, :, ::step, ::step]
    parts = [
        np.einsum("nchwij,ocij->nohw", part, kernels.astype(np.float64), optimize=True)
        for part, kernels in zip(np.split(windows, groups, 1), np.split(weight, groups), strict=True)
    ]
    return np.concatenate(parts, 1)


def distance(codes, positions):
    """How far beyond the nearest code the codes of a runtime lie: 0 for the nearest one, 1e-5 just beyond a tie."""
    return np.maximum(np.abs(codes - positions) - 0.5, 0)
