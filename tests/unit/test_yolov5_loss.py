import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.models.registry import load_detector
from qyolo_deploy.models.yolov5_loss import anchor_loss, assign_labels, complete_iou
from qyolo_deploy.training.loader import Loader

LEVELS = 3
STRIDES = (8, 16, 32, 64, 128, 256)
ANCHORS = [
    [10, 13, 16, 30],
    [30, 61, 62, 45],
    [116, 90, 156, 198],
    [200, 300, 400, 250],
    [500, 500, 9, 9],
    [1, 2, 3, 4],
]


# --- the same from the description alone: loops over labels, anchors and cells, in float64 ----------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def cross_entropy(logit, target):
    """Of the sigmoid of a logit; log(1 - s) is log(s) - x."""
    return math.log1p(math.exp(-abs(logit))) + max(logit, 0) - logit * target


def ciou(a, b, alpha=None):
    """IoU less the centres' distance over the hull's diagonal, less the weighted difference of the shapes."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    across = max(0, min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2))
    down = max(0, min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2))
    hull_w = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    hull_h = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    iou = across * down / (aw * ah + bw * bh - across * down)
    distance = ((ax - bx) ** 2 + (ay - by) ** 2) / (hull_w**2 + hull_h**2)
    v = 4 / math.pi**2 * (math.atan(bw / bh) - math.atan(aw / ah)) ** 2
    if alpha is None:
        alpha = v / (1 - iou + v) if v else 0
    return iou - distance - alpha * v, alpha


def who_answers(boxes, anchors, height, width):
    """(label, anchor, row, column) for boxes xywh in cells: every cell is asked."""
    found = []
    for i, (x, y, w, h) in enumerate(boxes):
        own = (min(int(y), height - 1), min(int(x), width - 1))
        beside = {own}
        if x - own[1] != 0.5:
            beside.add((own[0], own[1] + (1 if x - own[1] > 0.5 else -1)))
        if y - own[0] != 0.5:
            beside.add((own[0] + (1 if y - own[0] > 0.5 else -1), own[1]))
        for a, (anchor_w, anchor_h) in enumerate(anchors):
            if w == 0 or h == 0 or max(w / anchor_w, anchor_w / w, h / anchor_h, anchor_h / h) >= 4:
                continue
            for row in range(height):
                for column in range(width):
                    if (row, column) in beside:
                        found.append((i, a, row, column))
    return found


def reference(maps, batch, anchors, strides):
    """Box, objectness and class loss with their gains."""
    images, side = len(maps[0]), max(batch["img"].shape[-2:])
    balance = [4, 1, 0.4] if len(maps) == 3 else [4, 1, 0.25, 0.06, 0.02, 0.02][: len(maps)]
    total_box = total_objectness = total_class = 0.0
    for raw, pixels, stride, weight in zip(maps, anchors, strides, balance, strict=True):
        height, width = raw.shape[-2:]
        sizes = np.reshape(pixels, (-1, 2)) / stride
        cells = raw.detach().numpy().astype(np.float64).reshape(images, len(sizes), -1, height, width)
        boxes = batch["bboxes"].numpy().astype(np.float64) * [width, height, width, height]
        classes = cells.shape[2] - 5
        wanted, box_losses, class_losses = np.zeros((images, len(sizes), height, width)), [], []
        for label, a, row, column in who_answers(boxes, sizes, height, width):
            image = int(batch["batch_idx"][label])
            p = cells[image, a, :, row, column]
            at = [2 * sigmoid(p[0]) - 0.5 + column, 2 * sigmoid(p[1]) - 0.5 + row]
            at += [(2 * sigmoid(p[2])) ** 2 * sizes[a][0], (2 * sigmoid(p[3])) ** 2 * sizes[a][1]]
            overlap, _ = ciou(at, boxes[label])
            box_losses.append(1 - overlap)
            wanted[image, a, row, column] = max(wanted[image, a, row, column], overlap)
            for c in range(classes if classes > 1 else 0):
                class_losses.append(cross_entropy(p[5 + c], float(c == int(batch["cls"][label, 0]))))
        objectness = [cross_entropy(x, t) for x, t in zip(cells[:, :, 4].flat, wanted.flat, strict=True)]
        total_box += np.mean(box_losses) if box_losses else 0
        total_class += np.mean(class_losses) if class_losses else 0
        total_objectness += weight * np.mean(objectness)
    share = 3 / len(maps)
    return {
        "box": 0.05 * share * total_box,
        "obj": 1.0 * share * (side / 640) ** 2 * total_objectness,
        "cls": 0.5 * share * classes / 80 * total_class,
    }


# --- inputs ---------------------------------------------------------------------------------------------------


def make_maps(seed=0, images=2, classes=3, levels=LEVELS, height=128, width=192, anchors=2, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(images, anchors * (5 + classes), -(-height // s), -(-width // s), generator=generator) * spread
        for s in STRIDES[:levels]
    )


def make_batch(boxes, images=2, classes=3, height=128, width=192):
    """Labels of boxes (image, class, x, y, w, h), the latter as fractions."""
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6)
    assert not len(rows) or (rows[:, 0].max() < images and rows[:, 1].max() < max(classes, 1))
    return {
        "img": torch.zeros(images, 3, height, width),
        "batch_idx": rows[:, 0],
        "cls": rows[:, 1:2],
        "bboxes": rows[:, 2:],
    }


def loss_of(maps, batch, anchors=ANCHORS):
    levels = len(maps)
    pixels = torch.tensor(anchors[:levels], dtype=torch.float32).reshape(levels, -1, 2)
    return anchor_loss(maps, batch, pixels, STRIDES[:levels])


def check_against_reference(maps, batch):
    total, parts = loss_of(maps, batch)
    expected = reference(maps, batch, ANCHORS[: len(maps)], STRIDES[: len(maps)])
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert parts[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert total.item() == pytest.approx(sum(expected.values()) * len(maps[0]), rel=1e-5)


def targets_of(box, width=6, height=4, anchors=((1.0, 1.0),)):
    """Set of (anchor, row, column) that answer for one box xywh in cells."""
    batch = {
        "bboxes": torch.tensor([box]) / torch.tensor([width, height, width, height]),
        "cls": torch.zeros(1, 1),
        "batch_idx": torch.zeros(1),
    }
    found = assign_labels(batch, torch.tensor(anchors), height, width)
    rows = list(zip(found.anchor.tolist(), found.row.tolist(), found.column.tolist(), strict=True))
    assert len(rows) == len(set(rows))
    return set(rows)


# Multiples of 1/64 of the image: exact in float32, and often on the borders of cells and at limits of the ratio.
sixty_fourths = st.integers(0, 64).map(lambda n: n / 64)
labels = st.tuples(st.integers(0, 1), st.integers(0, 2), *[sixty_fourths] * 4)


# --- against the reference --------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(boxes=st.lists(labels, max_size=5), seed=st.integers(0, 2**16))
def test_loss_is_that_of_the_description(boxes, seed):
    check_against_reference(make_maps(seed), make_batch(boxes))


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_any_number_of_levels_and_classes(levels, classes):
    rng = np.random.default_rng(levels)
    boxes = [(rng.integers(3), rng.integers(classes), *rng.random(2), *rng.uniform(0.05, 0.9, 2)) for _ in range(12)]
    maps = make_maps(levels, images=3, classes=classes, levels=levels)
    check_against_reference(maps, make_batch(boxes, images=3, classes=classes))


@settings(max_examples=60)
@given(boxes=st.lists(labels, min_size=1, max_size=6))
def test_targets_are_those_of_the_description(boxes):
    batch, height, width = make_batch(boxes), 4, 6
    sizes = torch.tensor([[0.5, 1.0], [1.5, 0.75], [6.0, 0.25]])
    found = assign_labels(batch, sizes, height, width)
    pixels = batch["bboxes"].numpy() * [width, height, width, height]
    expected = sorted(
        (boxes[i][0], a, row, column, boxes[i][1], *(pixels[i] - [column, row, 0, 0]))
        for i, a, row, column in who_answers(pixels, sizes.tolist(), height, width)
    )
    columns = (found.image, found.anchor, found.row, found.column, found.classes, *found.boxes.T)
    got = sorted(zip(*(column.tolist() for column in columns), strict=True))
    np.testing.assert_allclose(np.reshape(got, (-1, 9)), np.reshape(expected, (-1, 9)), rtol=0, atol=1e-6)


def test_published_gains_make_this_sum():
    """All logits 0, one label that one anchor of one cell answers for with its very box: worked out by hand."""
    maps = tuple(torch.zeros(1, 2 * 85, 640 // s, 640 // s) for s in STRIDES[:3])
    anchors = [[32, 64, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    centre = (20.5 * 8 / 640, 30.5 * 8 / 640)
    batch = make_batch([(0, 5, *centre, 32 / 640, 64 / 640)], images=1, classes=80, height=640, width=640)
    total, parts = loss_of(maps, batch, anchors)
    log2 = math.log(2)  # the cross-entropy of a logit 0, whatever the target
    assert parts["box"] == pytest.approx(0, abs=1e-6)
    assert parts["obj"] == pytest.approx((4 + 1 + 0.4) * log2, rel=1e-6)
    assert parts["cls"] == pytest.approx(0.5 * log2, rel=1e-6)
    assert total.item() == pytest.approx(5.9 * log2, rel=1e-6)


def test_an_anchor_that_two_labels_claim_is_to_say_the_better_overlap():
    """With logits 0 the boxes are the anchors: each of the two labels is predicted exactly by one of them."""
    maps = tuple(raw.zero_().requires_grad_() for raw in make_maps(images=1, levels=1))
    centre, sizes = (12.5 / 24, 8.5 / 16), np.reshape(ANCHORS[0], (2, 2))
    small, large = ((0, c, *centre, w / 192, h / 128) for c, (w, h) in enumerate(sizes))
    both, reverse, only_small, only_large = (
        torch.autograd.grad(loss_of(maps, make_batch(boxes, images=1))[0], maps)[0][0, 4::8]
        for boxes in ([small, large], [large, small], [small], [large])
    )
    torch.testing.assert_close(both, reverse, rtol=0, atol=0)
    torch.testing.assert_close(both, torch.minimum(only_small, only_large))  # a higher target is a lower gradient
    assert only_small[0, 8, 12] < only_large[0, 8, 12] and only_large[1, 8, 12] < only_small[1, 8, 12]


# --- boundaries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "cells"),
    [
        (2.25, 1.25, {(1, 2), (1, 1), (0, 2)}),
        (2.75, 1.75, {(1, 2), (1, 3), (2, 2)}),
        (2.5, 1.25, {(1, 2), (0, 2)}),
        (2.5, 1.5, {(1, 2)}),
        (2.0, 1.0, {(1, 2), (1, 1), (0, 2)}),  # on a border the cells on both sides
        (0.25, 0.25, {(0, 0)}),  # nothing beyond the image
        (5.75, 3.75, {(3, 5)}),
        (0.0, 0.0, {(0, 0)}),
        (6.0, 4.0, {(3, 5)}),
        (6.0, 2.25, {(2, 5), (1, 5)}),
    ],
)
def test_cells_that_answer(x, y, cells):
    assert targets_of((x, y, 1.0, 1.0)) == {(0, *cell) for cell in cells}


@pytest.mark.parametrize("size", [(4.0, 1.0), (1.0, 4.0), (0.25, 1.0), (1.0, 0.25), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_ratio_of_4_is_too_much(size):
    assert not targets_of((2.5, 1.5, *size), width=8)


@pytest.mark.parametrize("size", [(3.99, 1.0), (1.0, 3.99), (0.251, 1.0), (1.0, 0.251), (3.99, 0.251)])
def test_a_ratio_just_under_4_is_not(size):
    assert targets_of((2.5, 1.5, *size), width=8) == {(0, 1, 2)}


def test_every_anchor_within_the_ratio_answers():
    assert targets_of((2.5, 1.5, 1.0, 1.0), anchors=((0.5, 2.0), (8.0, 1.0), (1.0, 3.5))) == {(0, 1, 2), (2, 1, 2)}


@pytest.mark.parametrize("boxes", [[], [(0, 0, 0.5, 0.5, 0.0, 0.0)], [(1, 2, 0.5, 0.5, 1.0, 0.001)]])
def test_without_a_match_only_objectness_is_learned(boxes):
    maps = tuple(raw.requires_grad_() for raw in make_maps())
    total, parts = loss_of(maps, make_batch(boxes))
    assert parts["box"] == parts["cls"] == 0 and parts["obj"] > 0
    check_against_reference(maps, make_batch(boxes))
    for gradient in torch.autograd.grad(total, maps):
        learned = gradient.reshape(2, 2, 8, -1).abs().amax((0, 1, 3)) > 0
        assert learned.tolist() == [index == 4 for index in range(8)]


def test_a_single_class_is_not_learned():
    maps = tuple(raw.requires_grad_() for raw in make_maps(classes=1))
    batch = make_batch([(0, 0, 0.5, 0.5, 0.1, 0.2)], classes=1)
    total, parts = loss_of(maps, batch)
    assert parts["cls"] == 0 and parts["box"] > 0
    assert not any(g.reshape(2, 2, 6, -1)[:, :, 5].any() for g in torch.autograd.grad(total, maps))
    check_against_reference(maps, batch)


# --- gradients and number formats -------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 30.0, 200.0])
def test_gradients_are_finite(spread):
    rng = np.random.default_rng(5)
    boxes = [(rng.integers(2), rng.integers(3), *rng.random(2), *rng.uniform(0.01, 1.0, 2)) for _ in range(40)]
    maps = tuple(raw.requires_grad_() for raw in make_maps(spread=spread))
    total, _ = loss_of(maps, make_batch(boxes))
    assert torch.isfinite(total)
    for gradient in torch.autograd.grad(total, maps):
        assert torch.isfinite(gradient).all() and gradient.any()


def test_gradients_of_boxes_are_those_of_ciou_alone():
    """Neither the objectness target nor the weight of the shapes' difference passes on gradients."""
    (raw,) = (m.requires_grad_() for m in make_maps(seed=3, images=1, levels=1))
    batch = make_batch([(0, 1, 10.5 / 24, 6.5 / 16, 30 / 192, 24 / 128)], images=1)
    (gradient,) = torch.autograd.grad(loss_of((raw,), batch)[0], (raw,))
    label = np.array([10.5, 6.5, 30 / 8, 24 / 8])
    for a, (w, h) in enumerate(np.reshape(ANCHORS[0], (2, 2)) / 8):
        cell = raw.detach()[0, 8 * a : 8 * a + 4, 6, 10].double().numpy()

        def overlap(p, alpha=None, w=w, h=h):
            s = 1 / (1 + np.exp(-p))
            at = (2 * s[0] + 9.5, 2 * s[1] + 5.5, (2 * s[2]) ** 2 * w, (2 * s[3]) ** 2 * h)
            return ciou(at, label, alpha)

        alpha, step = overlap(cell)[1], 1e-5 * np.eye(4)
        slopes = [(overlap(cell + d, alpha)[0] - overlap(cell - d, alpha)[0]) / 2e-5 for d in step]
        expected = -0.05 * 3 / 2 * np.array(slopes)  # the mean over the two anchors, for one level
        np.testing.assert_allclose(gradient[0, 8 * a : 8 * a + 4, 6, 10], expected, rtol=1e-3, atol=1e-6)


def test_equal_boxes_overlap_fully_and_distant_ones_less_than_not_at_all():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 1.0]])
    same, apart = complete_iou(boxes, boxes), complete_iou(boxes, boxes + torch.tensor([9.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(same, torch.ones(2))
    assert (apart < 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_computed_with_in_float32(dtype):
    maps, batch = tuple(raw.to(dtype) for raw in make_maps()), make_batch([(1, 2, 0.4, 0.6, 0.2, 0.3)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, parts = loss_of(maps, batch)
    plain, expected = loss_of(tuple(raw.float() for raw in maps), batch)
    assert total.dtype == torch.float32
    assert total.item() == plain.item() and parts == expected


# --- real weights and labels ------------------------------------------------------------------------------------


def test_official_weights_know_the_labels_of_their_images(yolov5n_checkpoint, data_root):
    if not (data_root / "coco-subset").is_dir():
        pytest.skip("QYOLO_DATA has no coco-subset")
    detector = load_detector(yolov5n_checkpoint, None, None, 0).eval()
    data = load_dataset(data_root / "coco-subset", "val")
    loader = Loader(data, imgsz=320, batch=8, augment=None, images=8, workers=0, seed=0)
    batch = dict(next(iter(loader.epoch(0))))
    assert len(batch["img"]) == 8 and len(batch["cls"]) > 20
    with torch.no_grad():
        maps = detector.core(batch["img"])
        own, own_parts = detector.loss(maps, batch)
        other, other_parts = detector.loss(maps, {**batch, "batch_idx": (batch["batch_idx"] + 1) % 8})
    assert own < 0.5 * other
    assert all(value < 0.7 * other_parts[name] for name, value in own_parts.items())
    assert own_parts == pytest.approx(reference(maps, batch, detector.decode.anchors.numpy(), STRIDES[:3]), rel=1e-5)
