"""Block outputs, by which a student is compared with its teacher, and the loss of a step."""

import numpy as np
import pytest
import torch

from qyolo_deploy.graph.features import Teacher, block_of, expose_blocks
from qyolo_deploy.graph.trace import trace
from qyolo_deploy.models.registry import with_activation
from qyolo_deploy.recipe import LossSection
from qyolo_deploy.training.losses import detections_loss, features_loss, logits_loss, make_step

# By the architectures' YAML: all layers that another one reads, but for Concat and Upsample.
BLOCKS = {
    "pico": [*range(10), 12, 15, 16, 18, 19, 21],
    "yolov5": [*range(7), 9, 10, 12],
    "yolov10n": [*range(11), 13, 16, 17, 19, 20, 22],
}
MAPS = {"pico": 6, "yolov5": 2, "yolov10n": 6}


@pytest.fixture(scope="module")
def detectors(make_detector):
    return {kind: make_detector(kind, seed=8) for kind in BLOCKS}


def off(model):
    """A prepared model whose quantizers pass on."""
    model.set_activations(False)
    model.set_weights(False)
    return model


def block_outputs(detector, images):
    """What the detector's own layers give, by number."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, number=number: seen.update({number: output}))
        for number, layer in enumerate(detector.core.model)
    ]
    with torch.no_grad():
        maps = detector.core(images)
    for handle in handles:
        handle.remove()
    return maps, seen


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_that_another_reads_is_exposed_once(detectors, kind):
    traced = trace(detectors[kind].core)
    before = list(traced.graph.output_node().args[0])
    assert expose_blocks(traced) == len(before) == MAPS[kind]
    outputs = list(traced.graph.output_node().args[0])
    assert outputs[: len(before)] == before
    found = [block_of(str(node.target)) for node in outputs[len(before) :]]
    assert found == [f"model.{number}" for number in BLOCKS[kind]]


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_teacher_tells_what_the_detector_s_layers_compute(detectors, kind, images):
    expected, blocks = block_outputs(detectors[kind], images)
    maps, features = Teacher(detectors[kind])(images)
    torch.testing.assert_close(tuple(maps), expected, rtol=1e-2, atol=5e-3)
    assert len(features) == len(BLOCKS[kind])
    for number, feature in zip(BLOCKS[kind], features, strict=True):
        torch.testing.assert_close(feature, blocks[number], rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_student_without_quantizers_is_its_teacher(detectors, kind, make_prepared, images):
    student, teacher = off(make_prepared(detectors[kind], images=images)), Teacher(detectors[kind])
    with torch.no_grad():
        for own, wanted in zip(student.features(images), teacher(images), strict=True):
            torch.testing.assert_close(tuple(own), tuple(wanted), rtol=1e-2, atol=5e-3)
        assert torch.equal(student(images)[0], student.features(images)[0][0])


@pytest.mark.parametrize("activation", ["relu", "hardswish"])
def test_a_student_with_other_activations_has_the_same_blocks(pico, activation, make_prepared, images):
    student = make_prepared(with_activation(pico, activation), images=images)
    with torch.no_grad():
        shapes = [feature.shape for feature in student.features(images)[1]]
        assert shapes == [feature.shape for feature in Teacher(pico)(images)[1]]


def test_a_teacher_leaves_the_detector_as_it_is(make_detector, images):
    detector = make_detector()
    learned = [parameter.requires_grad for parameter in detector.core.parameters()]
    teacher = Teacher(detector)
    assert [parameter.requires_grad for parameter in detector.core.parameters()] == learned
    assert not [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    before = [feature.clone() for feature in teacher(images)[1]]
    with torch.no_grad():
        for parameter in detector.core.parameters():
            parameter.zero_()
    assert all(torch.equal(left, right) for left, right in zip(before, teacher(images)[1], strict=True))


def test_features_are_compared_tensor_by_tensor():
    rng = np.random.default_rng(0)
    teacher = [rng.normal(3, size, (2, 4, 5, 6)) for size in (0.1, 10)]
    student = [part + rng.normal(0, 0.1, part.shape) for part in teacher]
    expected = np.mean([((s - t) ** 2).mean() / t.var() for s, t in zip(student, teacher, strict=True)])
    found = features_loss(*([torch.tensor(part) for part in blocks] for blocks in (student, teacher)))
    assert found.item() == pytest.approx(expected)


# --- the loss of a batch ---


def make_batch(images, labeled):
    """One or two objects in each image that has labels."""
    boxes = torch.tensor([[0.3, 0.4, 0.3, 0.3], [0.6, 0.5, 0.4, 0.2], [0.5, 0.6, 0.6, 0.5], [0.4, 0.3, 0.2, 0.3]])
    index = torch.tensor([0.0, 0.0, 1.0, 2.0])
    mine = torch.tensor([labeled[int(number)] for number in index])
    return {
        "img": images,
        "bboxes": boxes[mine],
        "cls": torch.tensor([[0.0], [1.0], [2.0], [0.0]])[mine],
        "batch_idx": index[mine],
        "labeled": torch.tensor(labeled),
    }


def sub_batch(batch):
    """The labelled images alone, numbered anew."""
    kept = [number for number, known in enumerate(batch["labeled"].tolist()) if known]
    numbers = torch.tensor([float(kept.index(int(number))) for number in batch["batch_idx"]])
    return batch | {"img": batch["img"][kept], "batch_idx": numbers, "labeled": torch.ones(len(kept), dtype=torch.bool)}


@pytest.fixture(scope="module")
def three_images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["pico", "yolov5"])
@pytest.mark.parametrize("labeled", [[True, False, True], [False, True, True], [True, True, True]], ids=str)
def test_labels_count_where_there_are_any(detectors, kind, labeled, three_images):
    """Weighted by their share of the batch, so that an image weighs the same in every batch."""
    detector = detectors[kind]
    step = make_step(detector.core, detector, LossSection(labels=2.0, logits=0.0, detections=0.0))
    batch = make_batch(three_images, labeled)
    loss, parts = step(batch)
    own = sub_batch(batch)
    with torch.no_grad():
        total, _ = detector.loss(detector.core(own["img"]), own)
    assert parts["labels"] == pytest.approx(2.0 * total.item() / 3, rel=1e-4)
    assert loss.item() == pytest.approx(parts["labels"]) and list(parts) == ["labels"]
    assert parts["labels"] > 0.1


def test_labels_of_unlabelled_images_send_no_gradient(detectors, three_images):
    detector = detectors["pico"]
    maps = [raw.detach().requires_grad_() for raw in detector.core(three_images)]
    step = make_step(lambda images: tuple(maps), detector, LossSection(labels=1.0, logits=0.0, detections=0.0))
    loss, _ = step(make_batch(three_images, [True, False, True]))
    loss.backward()
    assert all((raw.grad[1] == 0).all() for raw in maps)
    assert all((raw.grad[number] != 0).any() for raw in maps[1::2] for number in (0, 2))


def test_a_batch_of_unlabelled_images_trains_by_distillation_alone(detectors, make_prepared, three_images):
    detector = detectors["pico"]
    model, batch = make_prepared(detector), make_batch(three_images, [False] * 3)
    parts = make_step(model, detector, LossSection(labels=1.0, logits=0.5, detections=0.0))(batch)[1]
    assert list(parts) == ["logits"] and parts["logits"] > 0
    loss, parts = make_step(model, detector, LossSection(labels=1.0, logits=0.0, detections=0.0))(batch)
    assert parts == {"labels": 0.0} and loss.item() == 0.0
    loss.backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)


def test_parts_are_weighted_and_added(detectors, make_prepared, three_images):
    detector = detectors["pico"]
    model, batch = make_prepared(detector), make_batch(three_images, [True] * 3)
    section = LossSection(labels=0.5, logits=2.0, detections=0.25, features=3.0)
    loss, parts = make_step(model, detector, section)(batch)
    with torch.no_grad():
        (own, features), (wanted, wanted_features) = model.features(three_images), Teacher(detector)(three_images)
        expected = {
            "logits": 2.0 * logits_loss(own, wanted),
            "detections": 0.25 * detections_loss(detector.decode(own), detector.decode(wanted)),
            "features": 3.0 * features_loss(features, wanted_features),
            "labels": 0.5 * detector.loss(own, batch)[0] / 3,
        }
    assert parts == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)
    assert loss.item() == pytest.approx(sum(parts.values()), rel=1e-5)


def test_a_perfect_student_has_no_loss(detectors, make_prepared, three_images):
    detector = detectors["pico"]
    section = LossSection(labels=0.0, logits=1.0, detections=1.0, features=1.0)
    loss, _ = make_step(off(make_prepared(detector)), detector, section)(make_batch(three_images, [True] * 3))
    assert loss.item() == pytest.approx(0.0, abs=1e-3)
