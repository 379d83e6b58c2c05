import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.training import TENSORS, Stop, assert_same_state, make_loader, same_batches, without_times
from torch import nn

from qyolo_deploy.errors import QyoloError
from qyolo_deploy.training.ema import Ema
from qyolo_deploy.training.loop import ParameterGroup, Schedule, fit
from qyolo_deploy.training.state import load_tensors

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


# --- the loop ---


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 3))


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


@pytest.fixture(scope="module")
def whole(train_scenes, tmp_path_factory):
    """A run that nobody interrupted."""
    return run_fit(train_scenes, tmp_path_factory.mktemp("whole") / "checkpoint")


@pytest.mark.parametrize("stop_after", [0, 2, 3, 5, 8])
def test_an_interrupted_run_ends_as_one_that_was_not(train_scenes, whole, tmp_path, stop_after):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        run_fit(train_scenes, checkpoint, stop_after=stop_after)
    network, trained, steps = run_fit(train_scenes, checkpoint)
    assert steps == 9 - stop_after // 3 * 3  # from the last finished epoch on, of three steps each
    assert_same_state(network.state_dict(), whole[0].state_dict())
    assert_same_state(trained.ema, whole[1].ema)
    assert without_times(trained.history) == without_times(whole[1].history)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_other_optimizers_resume_too(train_scenes, whole, tmp_path, optimizer):
    expected, _, _ = run_fit(train_scenes, tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(Stop):
        run_fit(train_scenes, tmp_path / "cut", optimizer=optimizer, stop_after=5)
    network, _, steps = run_fit(train_scenes, tmp_path / "cut", optimizer=optimizer)
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


def test_patience_ends_a_run_and_keeps_the_best_average(train_scenes, tmp_path):
    judge = Judge(SCORES)
    network, trained, steps = run_fit(train_scenes, tmp_path / "c", epochs=5, patience=2, evaluate=judge)
    assert steps == 4 * 3 and [entry["map50_95"] for entry in trained.history] == SCORES[:4]
    assert_same_state(trained.ema, judge.states[1])
    plain, _, _ = run_fit(train_scenes, tmp_path / "p", epochs=5)
    assert not torch.equal(network[0].weight, plain[0].weight)  # which went on
    again, same, steps = run_fit(train_scenes, tmp_path / "c", epochs=5, patience=2, evaluate=Judge(SCORES))
    assert steps == 0
    assert_same_state(again.state_dict(), network.state_dict())
    assert_same_state(same.ema, trained.ema)


def test_validation_sees_the_average_and_leaves_the_run_as_it_is(train_scenes, whole, tmp_path):
    judge = Judge([0.1, 0.2, 0.3])
    network, trained, _ = run_fit(train_scenes, tmp_path / "c", patience=1, evaluate=judge)
    assert_same_state(network.state_dict(), whole[0].state_dict())
    assert_same_state(trained.ema, whole[1].ema)
    assert_same_state(judge.states[2], whole[1].ema)
    assert not torch.equal(judge.states[0]["0.weight"], judge.states[1]["0.weight"])


@pytest.mark.parametrize("stop_after", [7, 10])
def test_an_interrupted_run_knows_its_best_average(train_scenes, tmp_path, stop_after):
    """After two and three epochs of three steps: before and after the score has fallen."""
    _, whole, _ = run_fit(train_scenes, tmp_path / "whole", epochs=5, patience=2, evaluate=Judge(SCORES))
    with pytest.raises(Stop):
        run_fit(train_scenes, tmp_path / "c", epochs=5, patience=2, evaluate=Judge(SCORES), stop_after=stop_after)
    judge = Judge(SCORES, seen=stop_after // 3)
    _, trained, steps = run_fit(train_scenes, tmp_path / "c", epochs=5, patience=2, evaluate=judge)
    assert steps == 12 - stop_after // 3 * 3
    assert_same_state(trained.ema, whole.ema)
    assert without_times(trained.history) == without_times(whole.history)


def test_a_finished_run_is_only_read(train_scenes, whole, tmp_path):
    run_fit(train_scenes, tmp_path / "checkpoint")
    network, trained, steps = run_fit(train_scenes, tmp_path / "checkpoint")
    assert steps == 0
    assert_same_state(network.state_dict(), whole[0].state_dict())
    assert_same_state(trained.ema, whole[1].ema)


def test_another_key_starts_over(train_scenes, whole, tmp_path):
    run_fit(train_scenes, tmp_path / "checkpoint", key="other")
    network, _, steps = run_fit(train_scenes, tmp_path / "checkpoint")
    assert steps == 9
    assert_same_state(network.state_dict(), whole[0].state_dict())


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "folder of nothing"])
def test_a_broken_checkpoint_starts_over(train_scenes, whole, tmp_path, damage):
    checkpoint = tmp_path / "checkpoint"
    run_fit(train_scenes, checkpoint)
    data = {"cut": checkpoint.read_bytes()[:-10], "text": b"hello", "empty": b""}.get(damage)
    checkpoint.unlink()
    if data is not None:
        checkpoint.write_bytes(data)
    network, _, steps = run_fit(train_scenes, checkpoint)
    assert steps == 9
    assert_same_state(network.state_dict(), whole[0].state_dict())


def test_a_checkpoint_holds_no_pickle_and_all_of_the_state(train_scenes, tmp_path):
    network, trained, _ = run_fit(train_scenes, tmp_path / "checkpoint")
    tensors, info = load_tensors(tmp_path / "checkpoint")
    assert info["key"] == "k" and info["ema_steps"] == 9 and len(info["history"]) == 3
    expected = {f"raw/{name}" for name in network.state_dict()} | {f"ema/{name}" for name in trained.ema}
    moments = {f"optimizer/{index}/{name}" for index in range(3) for name in ("step", "exp_avg", "exp_avg_sq")}
    assert set(tensors) == expected | moments


def test_a_loss_that_is_no_number_is_left_out_and_named(train_scenes, tmp_path, caplog):
    network, trained, steps = run_fit(train_scenes, tmp_path / "checkpoint", poison=[5])
    assert steps == 9
    assert [entry["skipped_steps"] for entry in trained.history] == [[], [5], []]
    assert "step 5: loss nan" in caplog.text
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    assert all(math.isfinite(entry["loss"]) for entry in trained.history)


def test_a_step_that_is_left_out_changes_nothing(train_scenes, tmp_path):
    """Not even the optimizer's moments: the run is the one whose step was never taken."""
    network = make_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    _, trained, _ = run_fit(train_scenes, tmp_path / "checkpoint", poison=[1, 2, 3], epochs=1, network=network)
    learned = {name for name in before if name.endswith(("weight", "bias"))}
    assert_same_state({name: network.state_dict()[name] for name in learned}, {name: before[name] for name in learned})
    assert trained.history[0]["skipped_steps"] == [1, 2, 3]


def test_a_run_that_has_diverged_ends_and_names_its_steps(train_scenes, tmp_path):
    with pytest.raises(QyoloError, match=r"not finite in steps 2 to 6 \(epoch 2\)"):
        run_fit(train_scenes, tmp_path / "checkpoint", poison=[2, 3, 4, 5, 6])


def test_no_epochs_leave_everything_as_it_is(train_scenes, tmp_path):
    before = {name: value.clone() for name, value in make_network().state_dict().items()}
    network, trained, steps = run_fit(train_scenes, tmp_path / "checkpoint", epochs=0)
    assert steps == 0 and trained.history == ()
    assert_same_state(network.state_dict(), before)
    assert_same_state(trained.ema, before)


def test_mosaic_ends_before_the_last_epochs(train_scenes, tmp_path):
    network, seen = make_network(), []

    def step(batch):
        seen.append({name: batch[name].clone() for name in TENSORS})
        return network(batch["img"]).square().mean(), {}

    groups, schedule = [ParameterGroup(list(network.parameters()), 0.01)], Schedule(2, 0.0, 0.1, 0.9, close_mosaic=1)
    loader = make_loader(train_scenes, mosaic=1.0)
    fit(network, step, groups, loader, schedule, checkpoint=tmp_path / "c", key="k", set_mode=network.train)
    with_mosaic, without = make_loader(train_scenes, mosaic=1.0), make_loader(train_scenes, mosaic=1.0)
    without.close_mosaic()
    assert same_batches(seen[:3], with_mosaic.epoch(0))
    assert same_batches(seen[3:], without.epoch(1))
    assert not same_batches(seen[3:], with_mosaic.epoch(1))


def test_history_tells_epochs_losses_and_rates(whole):
    history = whole[1].history
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert all(entry["loss"] == pytest.approx(entry["plain"]) and entry["seconds"] > 0 for entry in history)
    assert history[0]["lr"] > history[2]["lr"] > 0


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


def test_nothing_imports_torchvision(train_scenes, repository):
    architecture = repository / "recipes" / "architectures" / "yolov8-pico.yaml"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", _IMPORT_ALL, str(architecture), str(train_scenes.source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[] False"
