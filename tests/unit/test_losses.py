import numpy as np
import pytest
import torch

from qyolo_deploy.training.losses import detections_loss, logits_loss


def test_logits_are_compared_channel_by_channel():
    rng = np.random.default_rng(0)
    teacher = [rng.normal(0, [[[0.1]], [[10]]], (2, 2, 4, 4)), rng.normal(0, 1, (2, 2, 2, 2))]
    student = [part + rng.normal(0, 0.1, part.shape) for part in teacher]
    expected = np.mean(
        [
            np.mean([((s[:, c] - t[:, c]) ** 2).mean() / t[:, c].var() for c in range(2)])
            for s, t in zip(student, teacher, strict=True)
        ]
    )
    found = logits_loss(*([torch.tensor(part) for part in maps] for maps in (student, teacher)))
    assert found.item() == pytest.approx(expected)


def test_perfect_detections_have_no_loss_and_worse_ones_more():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(2, 4, 50, generator=generator) * 40 + 10
    teacher = torch.cat([boxes, torch.rand(2, 3, 50, generator=generator)], 1)
    assert detections_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-4)
    losses = []
    for shift in (0.5, 2.0, 8.0):
        student = teacher.clone()
        student[:, 0] += shift
        losses.append(detections_loss(student, teacher).item())
    assert 0 < losses[0] < losses[1] < losses[2]
    for change in (-0.05, -0.2):
        student = teacher.clone()
        student[:, 4:] = (student[:, 4:] + change).clamp(0.01, 0.99)
        losses.append(detections_loss(student, teacher).item())
    assert 0 < losses[3] < losses[4]


def test_the_box_part_is_one_minus_iou_where_the_teacher_is_sure():
    teacher = torch.tensor([[[10.0, 50.0], [10.0, 50.0], [8.0, 8.0], [8.0, 8.0], [1.0, 0.0]]])
    student = teacher.clone()
    student[0, 0] += 4.0  # half of each box: IoU 1/3; of the second the teacher thinks nothing
    assert detections_loss(student, teacher).item() == pytest.approx(7.5 * (1 - 1 / 3), rel=1e-3)
