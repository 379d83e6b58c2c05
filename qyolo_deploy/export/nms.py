"""The pass that ends a graph with non-maximum suppression, for programs that want detections and nothing else."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qyolo_deploy.errors import InputError
from qyolo_deploy.export.float_onnx import OUTPUT

COLUMNS = 6
_SCOPE = "nms"


def suppress(model: ir.Model, conf: float, iou: float, max_det: int) -> ir.Model:
    """Makes final detections the output; the model is left as it is.

    As in our own decode, each class of an anchor is a candidate of its own, and classes are suppressed apart.

    Requires that the output is `output0`, `[N, 4 + nc, A]`. Ensures that it is `output0`, float32 `[N, max_det, 6]`:
    x1 y1 x2 y2 in pixels, score and class, the highest scores first, rows of zeros behind the last detection. This is
    what `nms=True` gives in exports of ultralytics.

    Args:
        model: From `export_float`.
        conf: Only scores above it count.
        iou: A box that overlaps a better one of its class by more than this IoU is suppressed.
        max_det: Rows of each image.

    Raises:
        InputError: If the graph does not end in candidates.
    """
    suppressed = model.clone()
    graph = suppressed.graph
    if [value.name for value in graph.outputs] != [OUTPUT]:
        raise InputError(f"the exported graph has no output '{OUTPUT}' to suppress boxes of")
    (candidates,) = graph.outputs
    assert candidates.shape is not None
    batch = candidates.shape[0]
    candidates.name = f"{_SCOPE}.candidates"
    detections = _Suppression(graph).detections(candidates, conf, iou, max_det)
    detections.name, detections.dtype = OUTPUT, ir.DataType.FLOAT
    detections.shape = ir.Shape((batch, max_det, COLUMNS))
    graph.outputs[:] = [detections]
    return suppressed


class _Suppression:
    """Adds nodes to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._count = 0

    def detections(self, candidates: ir.Value, conf: float, iou: float, max_det: int) -> ir.Value:
        """`[N, 4 + nc, A]` to `[N, max_det, 6]`."""
        boxes, scores = self._corners(candidates), self._slice(candidates, 4, None, axis=1)
        limits = [
            self._constant(np.array([limit], dtype))
            for limit, dtype in ((max_det, np.int64), (iou, np.float32), (conf, np.float32))
        ]
        # [M, 3]: image, class, anchor.
        selected = self._node("NonMaxSuppression", [boxes, scores, *limits])
        image, label = self._slice(selected, 0, 1, axis=1), self._slice(selected, 1, 2, axis=1)
        anchor = self._slice(selected, 2, 3, axis=1)
        score = self._node("GatherND", [scores, selected])
        row = self._node(
            "Concat",
            [
                self._node("GatherND", [boxes, self._node("Concat", [image, anchor], axis=1)]),
                self._node("Unsqueeze", [score, self._constant(np.array([1]))]),
                self._node("Cast", [label], to=int(ir.DataType.FLOAT)),
            ],
            axis=1,
        )
        rows = self._node("Concat", [row, self._constant(np.zeros((max_det, COLUMNS), np.float32))], axis=0)
        best = self._best(candidates, self._node("Squeeze", [image, self._constant(np.array([1]))]), score, max_det)
        return self._node("Gather", [rows, best], axis=0)

    def _corners(self, candidates: ir.Value) -> ir.Value:
        """Boxes as x1 y1 x2 y2, `[N, A, 4]`."""
        centre, size = self._slice(candidates, 0, 2, axis=1), self._slice(candidates, 2, 4, axis=1)
        half = self._node("Mul", [size, self._constant(np.float32(0.5))])
        ends = [self._node(kind, [centre, half]) for kind in ("Sub", "Add")]
        return self._node("Transpose", [self._node("Concat", ends, axis=1)], perm=[0, 2, 1])

    def _best(self, candidates: ir.Value, image: ir.Value, score: ir.Value, max_det: int) -> ir.Value:
        """For each image the indices of its best rows, and then those of the rows of zeros; int64 `[N, max_det]`.

        Rows of zeros count as scored 0 in every image, rows of other images as -1.
        """
        fill = self._constant(np.zeros(max_det, np.float32))
        owner = self._node("Concat", [image, self._constant(np.full(max_det, -1))], axis=0)
        own = self._node("Concat", [score, fill], axis=0)
        is_fill = self._node("Less", [owner, self._constant(np.int64(0))])
        others = self._node("Where", [is_fill, self._constant(np.float32(0)), self._constant(np.float32(-1))])
        count = self._node("Shape", [candidates], start=0, end=1)
        numbers = self._node(
            "Range",
            [
                self._constant(np.int64(0)),
                self._node("Squeeze", [count, self._constant(np.array([0]))]),
                self._constant(np.int64(1)),
            ],
        )
        mine = self._node("Equal", [owner, self._node("Unsqueeze", [numbers, self._constant(np.array([1]))])])
        key = self._node("Where", [mine, own, others])
        return self._node("TopK", [key, self._constant(np.array([max_det]))], outputs=2, axis=1)

    def _slice(self, value: ir.Value, start: int, end: int | None, axis: int) -> ir.Value:
        last = np.iinfo(np.int64).max if end is None else end
        return self._node("Slice", [value, *(self._constant(np.array([number])) for number in (start, last, axis))])

    def _constant(self, data: NDArray[np.generic] | np.generic) -> ir.Value:
        array = np.asarray(data)
        name = self._name("constant")
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self._graph.register_initializer(value)
        return value

    def _node(self, kind: str, inputs: Sequence[ir.Value], outputs: int = 1, **attributes: int | list[int]) -> ir.Value:
        """The last output of a new node."""
        name = self._name(kind.lower())
        names = [f"{name}.{index}" for index in range(outputs - 1)] + [name]
        node = ir.node(kind, inputs, attributes, outputs=[ir.Value(name=text) for text in names], name=name)
        self._graph.append(node)
        return node.outputs[-1]

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{_SCOPE}.{kind}_{self._count}"
