from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qyolo_deploy.validate.detections import decode


def plain_detections(output, conf, iou, max_det, multi_label):
    """Candidates and suppression written out in exact arithmetic: (box, score, class), best first."""
    candidates = []
    for label, row in enumerate(output[4:].tolist()):
        for anchor, score in enumerate(row):
            column = output[4:, anchor].tolist()
            if score > conf and (multi_label or label == column.index(max(column))):
                x, y, w, h = (Fraction(v) for v in output[:4, anchor].tolist())
                order = label if multi_label else 0
                box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
                candidates.append((-score, order, anchor, label, box))
    kept = []
    for _, _, anchor, label, box in sorted(candidates):
        if all(label != other or exact_iou(box, rival) <= iou for _, other, rival in kept):
            kept.append((anchor, label, box))
    return [(tuple(map(float, box)), float(output[4 + label, a]), label) for a, label, box in kept][:max_det]


def exact_iou(a, b):
    width = max(Fraction(0), min(a[2], b[2]) - max(a[0], b[0]))
    height = max(Fraction(0), min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else Fraction(0)


def as_list(found):
    return list(zip(map(tuple, found.boxes.tolist()), found.scores.tolist(), found.classes.tolist(), strict=True))


def random_output(rng, classes, anchors, extent, levels):
    output = np.empty((4 + classes, anchors), np.float32)
    output[:2] = rng.integers(0, extent, (2, anchors))
    output[2:4] = rng.integers(0, max(2, extent // 2), (2, anchors))
    # Few score levels, so that ties are the rule.
    output[4:] = rng.integers(0, levels, (classes, anchors)) / levels
    return output


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(1, 4),
    anchors=st.integers(7, 40),
    extent=st.sampled_from([4, 16, 64]),
    levels=st.sampled_from([2, 4, 64]),
    conf=st.sampled_from([0.0, 0.25, 0.5]),
    iou=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    max_det=st.sampled_from([1, 5, 300]),
    multi_label=st.booleans(),
)
def test_decode_equals_plain_suppression(seed, classes, anchors, extent, levels, conf, iou, max_det, multi_label):
    output = random_output(np.random.default_rng(seed), classes, anchors, extent, levels)
    found = decode(output, conf, iou, max_det, multi_label=multi_label)
    assert as_list(found) == plain_detections(output, conf, iou, max_det, multi_label)


@pytest.mark.parametrize("max_det", [100, 10_000])
def test_decode_equals_plain_suppression_beyond_one_block(max_det):
    output = random_output(np.random.default_rng(3), classes=2, anchors=500, extent=96, levels=256)
    found = decode(output, 0.25, 0.5, max_det)
    expected = plain_detections(output, 0.25, 0.5, max_det, multi_label=True)
    assert len(expected) >= 100
    assert as_list(found) == expected
