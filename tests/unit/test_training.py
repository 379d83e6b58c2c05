import math
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.data.records import DetectionDataset, ImageRecord
from qyolo_deploy.data.synthetic import generate
from qyolo_deploy.errors import QyoloError
from qyolo_deploy.graph.fake_quantize import MIN_SCALE, Quantizer
from qyolo_deploy.graph.layers import MIN_GAMMA, QuantConv
from qyolo_deploy.qat.train import train_qat
from qyolo_deploy.qat.train_float import train_float
from qyolo_deploy.recipe import AugmentSection, Recipe
from qyolo_deploy.training.ema import Ema
from qyolo_deploy.training.loader import Loader, calibration_batches
from qyolo_deploy.training.loop import ParameterGroup, Schedule, fit
from qyolo_deploy.training.losses import detections_loss, logits_loss
from qyolo_deploy.training.state import load_tensors

IMGSZ = 64
TENSORS = ("img", "cls", "bboxes", "batch_idx")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Twelve scenes of the size that the tests train on."""
    root = tmp_path_factory.mktemp("scenes") / "data"
    return load_dataset(generate(root, seed=0, train_images=12, val_images=1, imgsz=IMGSZ), "train")


def make_loader(dataset, seed=0, batch=4, images=None, workers=0, **augment):
    section = AugmentSection(**augment)
    return Loader(dataset, imgsz=IMGSZ, batch=batch, augment=section, images=images, workers=workers, seed=seed)


def same_batches(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in TENSORS
    )


# --- EMA and schedule ---


class Learner(nn.Module):
    """A weight, a scale and a counter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("count", torch.tensor(0))


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.998])
def test_ema_follows_the_closed_form(decay):
    """Of a value that jumps once and stays, `prod(a_k)` of the distance is left after n steps."""
    learner, warmup = Learner(), 7.0
    ema = Ema(learner, decay, warmup)
    start = {name: value.double().clone() for name, value in learner.state_dict().items()}
    with torch.no_grad():
        learner.weight.copy_(torch.tensor([5.0, 5.0, -1.0]))
        learner.scale.fill_(0.01)
        learner.count.fill_(12)
    left = 1.0
    for step in range(1, 31):
        ema.update()
        left *= decay * (1 - math.exp(-step / warmup))
        for name in ("weight", "scale"):
            end = learner.state_dict()[name].double()
            torch.testing.assert_close(
                ema.shadow[name].double(), end + (start[name] - end) * left, rtol=1e-5, atol=1e-6
            )
    assert ema.shadow["count"].item() == 12
    assert ema.steps == 30


def test_ema_does_not_follow_through_shared_memory():
    learner = Learner()
    ema = Ema(learner, 0.9, 10)
    with torch.no_grad():
        learner.weight.zero_()
    assert ema.shadow["weight"].tolist() == [1.0, -2.0, 3.0]


def test_learning_rates_rise_linearly_and_fall_as_a_cosine():
    plain = Schedule(epochs=4, warmup_epochs=0.0, final_lr=0.1, ema_decay=0.0)
    assert plain.factor(0, 10) == 1.0
    assert plain.factor(20, 10) == pytest.approx(0.55)
    assert plain.factor(40, 10) == pytest.approx(0.1)
    factors = [plain.factor(step, 10) for step in range(41)]
    assert factors == sorted(factors, reverse=True)
    warm = Schedule(epochs=4, warmup_epochs=0.5, final_lr=0.1, ema_decay=0.0)
    for step in range(5):
        assert warm.factor(step, 10) == pytest.approx(plain.factor(step, 10) * (step + 1) / 5)
    assert warm.factor(5, 10) == plain.factor(5, 10)


# --- loader ---


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_batches_go_by_seed_and_epoch_alone(dataset, mosaic):
    first = make_loader(dataset, mosaic=mosaic)
    epochs = [list(first.epoch(number)) for number in range(3)]
    for number in (2, 0, 1):  # in another order, as a resumed run sees them
        assert same_batches(make_loader(dataset, mosaic=mosaic).epoch(number), epochs[number])
    again = make_loader(dataset, mosaic=mosaic)
    assert same_batches(again.epoch(1), epochs[1]) and same_batches(again.epoch(1), epochs[1])
    assert not same_batches(epochs[0], epochs[1])
    assert not same_batches(make_loader(dataset, seed=1, mosaic=mosaic).epoch(0), epochs[0])


def test_what_was_drawn_before_does_not_matter(dataset):
    expected = list(make_loader(dataset).epoch(0))
    torch.rand(5), np.random.default_rng().random(3), np.random.random(3)  # noqa: NPY002
    assert same_batches(make_loader(dataset).epoch(0), expected)


def test_worker_processes_draw_by_seed_too(dataset):
    one = list(make_loader(dataset, workers=1, images=8).epoch(0))
    assert same_batches(make_loader(dataset, workers=1, images=8).epoch(0), one)


def test_batches_are_images_in_0_to_1_with_their_boxes(dataset):
    batches = list(make_loader(dataset).epoch(0))
    assert len(batches) == len(make_loader(dataset)) == 3
    for batch in batches:
        assert (batch["img"].shape, batch["img"].dtype) == ((4, 3, IMGSZ, IMGSZ), torch.float32)
        assert batch["img"].min() >= 0 and 0.5 < batch["img"].max() <= 1
        assert len(batch["cls"]) == len(batch["bboxes"]) == len(batch["batch_idx"]) > 0
        assert batch["bboxes"].min() >= 0 and batch["bboxes"].max() <= 1
        assert set(batch["cls"].flatten().tolist()) <= set(range(len(dataset.class_names)))
        assert set(batch["batch_idx"].tolist()) <= {0, 1, 2, 3}


def test_a_subset_is_chosen_by_seed(dataset):
    def files(loader):
        return sorted(name for batch in loader.epoch(0) for name in batch["im_file"])

    chosen = files(make_loader(dataset, images=5, batch=5))
    assert len(set(chosen)) == 5
    assert files(make_loader(dataset, images=5, batch=5)) == chosen
    assert files(make_loader(dataset, images=5, batch=5, seed=3)) != chosen
    assert len(make_loader(dataset, images=5, batch=2)) == 2  # the last, smaller one is left out
    assert len(make_loader(dataset, images=5, batch=16)) == 1  # unless it is the only one


def test_closing_mosaic_ends_it(dataset):
    loader = make_loader(dataset, mosaic=1.0, scale=0.0, translate=0.0, fliplr=0.0)
    with_mosaic = sum(len(batch["cls"]) for batch in loader.epoch(0))
    loader.close_mosaic()
    without = sum(len(batch["cls"]) for batch in loader.epoch(0))
    assert without == sum(len(classes) for classes in dataset.classes)
    assert with_mosaic != without


def test_images_and_boxes_lie_where_the_letterbox_puts_them(tmp_path):
    """A wide and a tall image, without augmentation: pixels as in calibration and validation, boxes with them."""
    rng = np.random.default_rng(0)
    sizes, boxes = [(64, 32), (24, 64)], [[[4, 2, 20, 30], [0, 0, 64, 32]], [[1.5, 10, 23, 64]]]
    records = []
    for number, (width, height) in enumerate(sizes):
        path = tmp_path / f"{number}.png"
        assert cv2.imwrite(str(path), rng.integers(0, 256, (height, width, 3), np.uint8))
        records.append(ImageRecord(number, path, width, height))
    dataset = DetectionDataset(
        source=tmp_path,
        split="train",
        class_names=("a", "b"),
        category_ids=(1, 2),
        images=tuple(records),
        boxes=tuple(np.array(part, np.float32) for part in boxes),
        classes=(np.array([1, 0]), np.array([1])),
        ground_truth={},
        annotation_file=None,
    )
    loader = Loader(dataset, imgsz=IMGSZ, batch=2, augment=None, images=None, workers=0, seed=0)
    (batch,) = loader.epoch(0)
    pixels = torch.cat(list(calibration_batches(dataset, 2, IMGSZ, 1, seed=0)))
    for slot, file in enumerate(batch["im_file"]):
        number = [str(record.path) for record in records].index(file)
        image, placed = letterbox(read_image(records[number].path), IMGSZ, rect=False)
        torch.testing.assert_close(batch["img"][slot], torch.from_numpy(to_tensor(image)[0]), rtol=0, atol=1e-6)
        assert any(torch.equal(torch.from_numpy(to_tensor(image)[0]), found) for found in pixels)
        mine = batch["batch_idx"] == slot
        assert batch["cls"][mine].flatten().tolist() == dataset.classes[number].tolist()
        corners = np.array(boxes[number]) * placed.ratio + [placed.pad_x, placed.pad_y] * 2
        centres, spans = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        np.testing.assert_allclose(batch["bboxes"][mine], np.hstack([centres, spans]) / IMGSZ, atol=1e-5)


# --- losses ---


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


# --- the loop ---


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 3))


class Stop(Exception):
    """The power cut."""


def run_fit(
    dataset,
    checkpoint,
    *,
    key="k",
    stop_after=None,
    epochs=3,
    network=None,
    poison=None,
    mosaic=1.0,
    evaluate=None,
    **schedule,
):
    """Trains a small network on real batches; returns it, the result and how many steps were taken."""
    network = network or make_network()
    steps = 0

    def step(batch):
        nonlocal steps
        if steps == stop_after:
            raise Stop
        steps += 1
        loss = network(batch["img"]).square().mean() + 0.01 * batch["bboxes"].sum() * network[3].bias.sum()
        if poison is not None and steps in poison:
            loss = loss * math.nan
        return loss, {"plain": loss.item()}

    trained = fit(
        network,
        step,
        [ParameterGroup([network[0].weight, network[3].weight], 0.01, 0.1), ParameterGroup([network[3].bias], 0.1)],
        make_loader(dataset, mosaic=mosaic),
        Schedule(epochs, 0.5, 0.01, 0.9, close_mosaic=1, **schedule),
        checkpoint=checkpoint,
        key=key,
        set_mode=network.train,
        evaluate=None if evaluate is None else lambda: evaluate(network),
    )
    return network, trained, steps


def assert_same_state(left, right):
    assert set(left) == set(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def without_times(history):
    return [{key: value for key, value in entry.items() if key not in ("seconds", "images_per_s")} for entry in history]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run that nobody interrupted."""
    return run_fit(dataset, tmp_path_factory.mktemp("whole") / "checkpoint")


@pytest.mark.parametrize("stop_after", [0, 2, 3, 5, 8])
def test_an_interrupted_run_ends_as_one_that_was_not(dataset, whole, tmp_path, stop_after):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        run_fit(dataset, checkpoint, stop_after=stop_after)
    network, trained, steps = run_fit(dataset, checkpoint)
    assert steps == 9 - stop_after // 3 * 3  # from the last finished epoch on, of three steps each
    assert_same_state(network.state_dict(), whole[0].state_dict())
    assert_same_state(trained.ema, whole[1].ema)
    assert without_times(trained.history) == without_times(whole[1].history)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_other_optimizers_resume_too(dataset, whole, tmp_path, optimizer):
    expected, _, _ = run_fit(dataset, tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(Stop):
        run_fit(dataset, tmp_path / "cut", optimizer=optimizer, stop_after=5)
    network, _, steps = run_fit(dataset, tmp_path / "cut", optimizer=optimizer)
    assert steps == 6
    assert_same_state(network.state_dict(), expected.state_dict())
    assert not torch.equal(network[0].weight, whole[0][0].weight)


@pytest.mark.parametrize(
    ("optimizer", "momentum"), [("sgd", 0.9), ("sgd", 0.0), ("adam", 0.937), ("adamw", 0.937)], ids=str
)
def test_optimizers_step_as_their_papers_say(optimizer, momentum):
    """SGD with Nesterov's momentum; Adam with decay in the gradient, AdamW with decay beside it."""
    start, rate, decay = np.array([1.0, -2.0, 0.5]), 0.1, 0.05
    learned = nn.Parameter(torch.tensor(start))
    schedule = Schedule(1, 0.0, 1.0, 0.0, optimizer=optimizer, momentum=momentum)
    ours = schedule.make_optimizer([ParameterGroup([learned], rate, decay)])
    x, first, second = start, np.zeros(3), np.zeros(3)
    for step in range(1, 5):
        grad = np.array([0.3, -1.0, 0.02]) * step - 0.5
        learned.grad = torch.tensor(grad)
        ours.step()
        if optimizer == "adamw":
            x = x * (1 - rate * decay)
        else:
            grad = grad + decay * x
        if optimizer == "sgd":
            first = momentum * first + grad if step > 1 else grad
            x = x - rate * (grad + momentum * first)
        else:
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            x = x - rate * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(learned.detach(), x, rtol=1e-9)


# --- early stopping ---


class Judge:
    """Scores the states that it is shown with given numbers, and keeps the states."""

    def __init__(self, scores, seen=0):
        self.scores, self.seen, self.states = scores, seen, []

    def __call__(self, network):
        self.states.append({name: value.clone() for name, value in network.state_dict().items()})
        self.seen += 1
        return self.scores[self.seen - 1]


SCORES = [0.1, 0.5, 0.4, 0.5, 0.6]  # that of epoch 2 is the best when patience ends after epoch 4


def test_patience_ends_a_run_and_keeps_the_best_average(dataset, tmp_path):
    judge = Judge(SCORES)
    network, trained, steps = run_fit(dataset, tmp_path / "c", epochs=5, patience=2, evaluate=judge)
    assert steps == 4 * 3 and [entry["map50_95"] for entry in trained.history] == SCORES[:4]
    assert_same_state(trained.ema, judge.states[1])
    plain, _, _ = run_fit(dataset, tmp_path / "p", epochs=5)
    assert not torch.equal(network[0].weight, plain[0].weight)  # which went on
    again, same, steps = run_fit(dataset, tmp_path / "c", epochs=5, patience=2, evaluate=Judge(SCORES))
    assert steps == 0
    assert_same_state(again.state_dict(), network.state_dict())
    assert_same_state(same.ema, trained.ema)


def test_validation_sees_the_average_and_leaves_the_run_as_it_is(dataset, whole, tmp_path):
    judge = Judge([0.1, 0.2, 0.3])
    network, trained, _ = run_fit(dataset, tmp_path / "c", patience=1, evaluate=judge)
    assert_same_state(network.state_dict(), whole[0].state_dict())
    assert_same_state(trained.ema, whole[1].ema)
    assert_same_state(judge.states[2], whole[1].ema)
    assert not torch.equal(judge.states[0]["0.weight"], judge.states[1]["0.weight"])


@pytest.mark.parametrize("stop_after", [7, 10])
def test_an_interrupted_run_knows_its_best_average(dataset, tmp_path, stop_after):
    """After two and three epochs of three steps: before and after the score has fallen."""
    _, whole, _ = run_fit(dataset, tmp_path / "whole", epochs=5, patience=2, evaluate=Judge(SCORES))
    with pytest.raises(Stop):
        run_fit(dataset, tmp_path / "c", epochs=5, patience=2, evaluate=Judge(SCORES), stop_after=stop_after)
    judge = Judge(SCORES, seen=stop_after // 3)
    _, trained, steps = run_fit(dataset, tmp_path / "c", epochs=5, patience=2, evaluate=judge)
    assert steps == 12 - stop_after // 3 * 3
    assert_same_state(trained.ema, whole.ema)
    assert without_times(trained.history) == without_times(whole.history)


def test_a_finished_run_is_only_read(dataset, whole, tmp_path):
    run_fit(dataset, tmp_path / "checkpoint")
    network, trained, steps = run_fit(dataset, tmp_path / "checkpoint")
    assert steps == 0
    assert_same_state(network.state_dict(), whole[0].state_dict())
    assert_same_state(trained.ema, whole[1].ema)


def test_another_key_starts_over(dataset, whole, tmp_path):
    run_fit(dataset, tmp_path / "checkpoint", key="other")
    network, _, steps = run_fit(dataset, tmp_path / "checkpoint")
    assert steps == 9
    assert_same_state(network.state_dict(), whole[0].state_dict())


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "folder of nothing"])
def test_a_broken_checkpoint_starts_over(dataset, whole, tmp_path, damage):
    checkpoint = tmp_path / "checkpoint"
    run_fit(dataset, checkpoint)
    data = {"cut": checkpoint.read_bytes()[:-10], "text": b"hello", "empty": b""}.get(damage)
    checkpoint.unlink()
    if data is not None:
        checkpoint.write_bytes(data)
    network, _, steps = run_fit(dataset, checkpoint)
    assert steps == 9
    assert_same_state(network.state_dict(), whole[0].state_dict())


def test_a_checkpoint_holds_no_pickle_and_all_of_the_state(dataset, tmp_path):
    network, trained, _ = run_fit(dataset, tmp_path / "checkpoint")
    tensors, info = load_tensors(tmp_path / "checkpoint")
    assert info["key"] == "k" and info["ema_steps"] == 9 and len(info["history"]) == 3
    expected = {f"raw/{name}" for name in network.state_dict()} | {f"ema/{name}" for name in trained.ema}
    moments = {f"optimizer/{index}/{name}" for index in range(3) for name in ("step", "exp_avg", "exp_avg_sq")}
    assert set(tensors) == expected | moments


def test_a_loss_that_is_no_number_is_left_out_and_named(dataset, tmp_path, caplog):
    network, trained, steps = run_fit(dataset, tmp_path / "checkpoint", poison=[5])
    assert steps == 9
    assert [entry["skipped_steps"] for entry in trained.history] == [[], [5], []]
    assert "step 5: loss nan" in caplog.text
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    assert all(math.isfinite(entry["loss"]) for entry in trained.history)


def test_a_step_that_is_left_out_changes_nothing(dataset, tmp_path):
    """Not even the optimizer's moments: the run is the one whose step was never taken."""
    network = make_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    _, trained, _ = run_fit(dataset, tmp_path / "checkpoint", poison=[1, 2, 3], epochs=1, network=network)
    learned = {name for name in before if name.endswith(("weight", "bias"))}
    assert_same_state({name: network.state_dict()[name] for name in learned}, {name: before[name] for name in learned})
    assert trained.history[0]["skipped_steps"] == [1, 2, 3]


def test_a_run_that_has_diverged_ends_and_names_its_steps(dataset, tmp_path):
    with pytest.raises(QyoloError, match=r"not finite in steps 2 to 6 \(epoch 2\)"):
        run_fit(dataset, tmp_path / "checkpoint", poison=[2, 3, 4, 5, 6])


def test_no_epochs_leave_everything_as_it_is(dataset, tmp_path):
    before = {name: value.clone() for name, value in make_network().state_dict().items()}
    network, trained, steps = run_fit(dataset, tmp_path / "checkpoint", epochs=0)
    assert steps == 0 and trained.history == ()
    assert_same_state(network.state_dict(), before)
    assert_same_state(trained.ema, before)


def test_mosaic_ends_before_the_last_epochs(dataset, tmp_path):
    network, seen = make_network(), []

    def step(batch):
        seen.append({name: batch[name].clone() for name in TENSORS})
        return network(batch["img"]).square().mean(), {}

    groups, schedule = [ParameterGroup(list(network.parameters()), 0.01)], Schedule(2, 0.0, 0.1, 0.9, close_mosaic=1)
    loader = make_loader(dataset, mosaic=1.0)
    fit(network, step, groups, loader, schedule, checkpoint=tmp_path / "c", key="k", set_mode=network.train)
    with_mosaic, without = make_loader(dataset, mosaic=1.0), make_loader(dataset, mosaic=1.0)
    without.close_mosaic()
    assert same_batches(seen[:3], with_mosaic.epoch(0))
    assert same_batches(seen[3:], without.epoch(1))
    assert not same_batches(seen[3:], with_mosaic.epoch(1))


def test_history_tells_epochs_losses_and_rates(whole):
    history = whole[1].history
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert all(entry["loss"] == pytest.approx(entry["plain"]) and entry["seconds"] > 0 for entry in history)
    assert history[0]["lr"] > history[2]["lr"] > 0


# --- quantization-aware training ---


def make_recipe(train=None, **sections):
    training = {"epochs": 2, "batch": 4, "ema_decay": 0.9, "augment": {"mosaic": 0.5, "close_mosaic": 1}}
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"architecture": "x", "imgsz": IMGSZ},
            "data": {"source": "synthetic", "calibration_images": 4},
            "quantization": {"weights": {"bits": 4}},
            "train": {**training, "images": 8, "lr": 0.001, "scale_lr": 0.02, **(train or {})},
            "float": {**training, "images": 8},
            **sections,
        }
    )


class Interrupter:
    """Progress that ends the process after some batches of training."""

    def __init__(self, after):
        self.after = after

    def __call__(self, done, total, line):
        if line.startswith("epoch") and done == self.after:
            raise Stop


def run_qat(make_detector, dataset, checkpoint, after=None, evaluate=None, **sections):
    detector, progress = make_detector("yolov5", seed=2), Interrupter(after) if after else None
    recipe = make_recipe(**sections)
    return train_qat(detector, dataset, recipe, checkpoint=checkpoint, key="k", evaluate=evaluate, progress=progress)


@pytest.fixture(scope="module")
def qat(make_detector, dataset, tmp_path_factory):
    return run_qat(make_detector, dataset, tmp_path_factory.mktemp("qat") / "checkpoint")


def assert_same_result(left, right):
    assert_same_state(dict(left.raw), dict(right.raw))
    assert_same_state(left.model.state_dict(), right.model.state_dict())
    assert without_times(left.history) == without_times(right.history)
    assert left.diagnostics.to_json() == right.diagnostics.to_json()


def test_interrupted_quantization_aware_training_ends_the_same(qat, make_detector, dataset, tmp_path):
    with pytest.raises(Stop):
        run_qat(make_detector, dataset, tmp_path / "checkpoint", after=3)
    assert_same_result(run_qat(make_detector, dataset, tmp_path / "checkpoint"), qat)


# Within two steps, weights must have gone there and back.
OSCILLATING = {"lr": 0.03, "final_lr": 1.0, "warmup_epochs": 0.0, "oscillation_momentum": 0.3}
SECTIONS = {
    "freezing and dampening": {
        **OSCILLATING,
        "freezing": {"first": 0.2, "last": 0.2},
        "dampening": {"weight": 0.01, "start": 0.0},
    },
    "stages and statistics": {**OSCILLATING, "backbone_first": 0.6, "norm": "batch", "reestimate_norm": 2},
    "gradient rules": {
        "optimizer": "sgd",
        "gradient": {"lsq_scale": True, "margin": 0.1, "latent_damping": 2.0},
        "loss": {"features": 1.0},
        "precision": "bfloat16",
    },
}


@pytest.mark.parametrize("name", SECTIONS)
def test_interrupted_training_of_every_kind_ends_the_same(make_detector, dataset, tmp_path, name):
    whole = run_qat(make_detector, dataset, tmp_path / "whole", train=SECTIONS[name])
    with pytest.raises(Stop):
        run_qat(make_detector, dataset, tmp_path / "cut", after=3, train=SECTIONS[name])
    if "freezing" in SECTIONS[name]:
        tensors, info = load_tensors(tmp_path / "cut")
        assert len(info["history"]) == 1 and tensors["raw/tracker.frozen"].sum() > 100
        assert any(layer["frozen"] > 0.01 for layer in whole.diagnostics.layers.values())
        assert all("dampening" in entry for entry in whole.history[1:])
    assert_same_result(run_qat(make_detector, dataset, tmp_path / "cut", train=SECTIONS[name]), whole)


def test_a_trained_model_needs_no_tracker(make_detector, dataset, tmp_path):
    """What was frozen lies in the weights, of the average and of the raw state."""
    result = run_qat(make_detector, dataset, tmp_path / "c", train=SECTIONS["freezing and dampening"])
    frozen = load_tensors(tmp_path / "c")[0]
    assert result.model.tracker is None and not [name for name in result.raw if name.startswith("tracker")]
    model, start = result.model, 0
    for state in (dict(result.raw), result.model.state_dict()):
        model.load_state_dict({name: value.clone() for name, value in state.items()})
        integers = torch.cat(
            [(conv.quantized_weight() / conv.weight_scale()).flatten() for conv in model.convs().values()]
        )
        mask = frozen["raw/tracker.frozen"]
        assert torch.equal(integers[mask].round().to(torch.int8), frozen["raw/tracker.frozen_integer"][mask])
        start += mask.sum()
    assert start > 200


def test_validation_during_training_sees_a_network_that_is_quantized_throughout(make_detector, dataset, tmp_path):
    """Also while only the backbone trains quantized, and by running statistics: scores must be of one kind."""
    seen = []

    def evaluate(model, detector):
        quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
        seen.append(all(quantizer.enabled for quantizer in quantizers))
        return float(all(conv.norm_momentum is None for conv in model.convs().values()))

    train = {"backbone_first": 0.9, "norm": "batch", "patience": 2}
    result = run_qat(make_detector, dataset, tmp_path / "c", evaluate=evaluate, train=train)
    assert seen == [True, True] and [entry["map50_95"] for entry in result.history] == [1.0, 1.0]


def test_bfloat16_leaves_quantizers_and_state_in_float32(qat, make_detector, make_prepared, dataset, images, tmp_path):
    model, kinds = make_prepared(make_detector("yolov5")), {}
    for module in model.modules():
        if isinstance(module, Quantizer | QuantConv):
            kind = type(module).__name__
            module.register_forward_hook(
                lambda _, __, output, kind=kind: kinds.setdefault(kind, set()).add(output.dtype)
            )
    with torch.autocast("cpu", torch.bfloat16):
        maps = model(images)
    assert kinds == {"Quantizer": {torch.float32}, "QuantConv": {torch.bfloat16}}
    assert all(raw.dtype == torch.float32 for raw in maps)
    result = run_qat(make_detector, dataset, tmp_path / "c", train={"precision": "bfloat16"})
    assert {value.dtype for value in result.raw.values()} == {torch.float32}
    ours, exact = result.history[0]["loss"], qat.history[0]["loss"]  # before roundings lead the two runs apart
    assert ours != exact and ours == pytest.approx(exact, rel=0.1)


def test_training_moves_weights_scales_and_offsets_and_averages_them(qat, make_detector, dataset, tmp_path):
    untrained = {"epochs": 0, "batch": 4, "images": 8}
    start = run_qat(make_detector, dataset, tmp_path / "checkpoint", train=untrained).model.state_dict()
    end, average = qat.raw, qat.model.state_dict()
    for kind in ("weight", "gamma", "beta", "quantizer.scale", "offset"):
        moved = [name for name in start if name.endswith(kind) and not torch.equal(start[name], end[name])]
        among = [name for name in start if name.endswith(kind)]
        # Gammas of the head's last layers, and offsets of weights, are not learned.
        assert len(moved) > 0.4 * len(among), kind
    scales = [name for name in start if name.endswith("scale") and "sigmoid" not in name]
    between = [name for name in scales if average[name].item() not in (start[name].item(), end[name].item())]
    assert len(between) > 0.9 * len(scales)
    gates = [name for name in start if name.endswith("sigmoid.scale")]
    assert gates and all(end[name] == average[name] == 1 / 256 for name in gates)
    for fixed in ("mean", "var", "log_gain", "shift"):
        names = [name for name in start if name.rpartition(".")[2] == fixed]
        assert len(names) == len(qat.model.convs())
        assert all(torch.equal(start[name], end[name]) for name in names), fixed


def test_everything_learned_is_in_range(qat):
    for state in (qat.raw, qat.model.state_dict()):
        qat.model.load_state_dict(dict(state))
        for module in qat.model.modules():
            if isinstance(module, Quantizer):
                span = module.scale * (module.spec.qmax - module.spec.qmin)
                assert (module.scale >= MIN_SCALE).all()
                assert (module.offset <= 0).all() and (module.offset >= -span * (1 + 1e-5)).all()
            if isinstance(module, QuantConv):
                assert (module.gamma >= MIN_GAMMA).all()


def test_clamping_brings_a_model_back_into_range(make_detector, make_prepared, images):
    model = make_prepared(make_detector())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(3.0)
    model.clamp_()
    for module in model.modules():
        if isinstance(module, Quantizer):
            assert (module.scale >= MIN_SCALE).all() and (module.offset <= 0).all()
        if isinstance(module, QuantConv) and module.has_norm:
            assert (module.gamma >= MIN_GAMMA).all()
    assert all(torch.isfinite(raw).all() for raw in model(images))


def test_interrupted_float_training_ends_the_same(make_detector, dataset, tmp_path):
    states = []
    for name, after in (("whole", None), ("cut", 3), ("cut", None)):
        detector = make_detector(seed=6)
        progress = Interrupter(after) if after else None
        try:
            history = train_float(
                detector, dataset, make_recipe(), checkpoint=tmp_path / name, key="k", progress=progress
            )
        except Stop:
            continue
        assert not detector.core.training
        assert all("labels" in entry for entry in history)
        states.append(detector.core.state_dict())
    assert_same_state(states[0], states[1])
    tracked = [value.item() for name, value in states[0].items() if name.endswith("num_batches_tracked")]
    assert set(tracked) == {1 + 4}  # what the fixture's one batch left, and two epochs of two


# --- imports ---

_IMPORT_ALL = """
import importlib, pkgutil, sys

class Watch:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            self.asked.append(name)
            raise ImportError("torchvision is not to be imported")

sys.meta_path.insert(0, Watch())
import qyolo_deploy
for folder in ("quant", "data", "engines", "models", "graph", "training", "qat", "qc", "export"):
    package = importlib.import_module(f"qyolo_deploy.{folder}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"qyolo_deploy.{folder}.{module.name}")
from pathlib import Path
from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.models.registry import load_detector
from qyolo_deploy.training.loader import Loader
from qyolo_deploy.recipe import AugmentSection
detector = load_detector(None, sys.argv[1], None, 0)
loader = Loader(load_dataset(Path(sys.argv[2]), "train"), imgsz=64, batch=4, augment=AugmentSection(mosaic=1.0),
                images=None, workers=0, seed=0)
for batch in loader.epoch(0):
    detector.loss(detector.core(batch["img"]), batch)[0].backward()
print(Watch.asked, "torchvision" in sys.modules)
"""


def test_nothing_imports_torchvision(dataset, repository):
    architecture = repository / "recipes" / "architectures" / "yolov8-pico.yaml"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", _IMPORT_ALL, str(architecture), str(dataset.source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[] False"
