"""What happens in each step of quantization-aware training: stages, dampening, freezing, and what is recorded."""

import math
from types import SimpleNamespace

import pytest
import torch

from qyolo_deploy.graph.fake_quantize import MIN_SCALE
from qyolo_deploy.qat.hooks import QatHooks
from qyolo_deploy.qat.oscillation import OscillationTracker
from qyolo_deploy.qat.traces import LAYERS, Traces
from qyolo_deploy.qat.train import parameter_groups
from qyolo_deploy.recipe import TrainSection
from qyolo_deploy.training.ema import Ema
from qyolo_deploy.training.loop import Schedule

BACKBONE = {"images", *(f"model.{number}" for number in range(6))}  # of the tiny YOLOv5; 6 to 13 are neck and head


@pytest.fixture
def model(make_detector, make_prepared):
    return make_prepared(make_detector("yolov5", seed=3))


def block(name):
    return ".".join(name.split(".")[:2])


def quantizers_of(model):
    """All quantizers, of activations and of weights, as pairs of block and quantizer."""
    found = [(block(group), quantizer) for group, quantizer in model.quantizers().items()]
    return found + [(block(name), conv.quantizer) for name, conv in model.convs().items()]


def shake(model, size, seed):
    """Moves the latent weights by about so many steps, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for conv in model.convs().values():
            conv.weight.add_(torch.randn(conv.weight.shape, generator=generator) * conv.weight_scale() * size)


def test_early_on_only_the_backbone_is_quantized(model, images):
    whole = model(images)
    hooks = QatHooks(model, TrainSection(backbone_first=0.4), 10)
    hooks.begin(0.0)
    assert {name for name, quantizer in quantizers_of(model) if quantizer.enabled} == BACKBONE
    late = {name for name, quantizer in quantizers_of(model) if not quantizer.enabled}
    assert late == {f"model.{number}" for number in (6, 9, 10, 12, 13)}
    early = model(images)
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(early, whole, strict=True))
    hooks.stepped(0.3, {})
    assert not all(quantizer.enabled for _, quantizer in quantizers_of(model))
    hooks.stepped(0.4, dict(model.state_dict()))
    assert all(quantizer.enabled for _, quantizer in quantizers_of(model))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model(images), whole, strict=True))


def test_without_stages_everything_is_quantized_from_the_start(model):
    QatHooks(model, TrainSection(), 10).begin(0.0)
    assert all(quantizer.enabled for _, quantizer in quantizers_of(model))


def test_a_run_that_ends_early_leaves_all_quantizers_on(model):
    hooks = QatHooks(model, TrainSection(backbone_first=0.9), 10)
    hooks.begin(0.0)
    hooks.finish()
    assert all(quantizer.enabled for _, quantizer in quantizers_of(model))
    assert model.tracker is None


def test_dampening_begins_at_its_start_and_rises(model):
    hooks = QatHooks(model, TrainSection(dampening={"weight": 0.01, "start": 0.5}), 10)
    told = []
    for progress in (0.2, 0.5, 0.75, 0.999999):
        for conv in model.convs().values():
            conv.weight.grad = torch.zeros_like(conv.weight)
        told.append(hooks.gradients_ready(progress).get("dampening", 0.0))
        largest = max(conv.weight.grad.abs().max() for conv in model.convs().values())
        assert (largest > 0) == (progress > 0.5)
    assert told[:2] == [0.0, 0.0]
    assert told[2] == pytest.approx(told[3] / 2, rel=1e-3) and told[3] > 0


def test_freezing_begins_at_its_start_with_a_falling_threshold(model):
    section = TrainSection(freezing={"first": 0.5, "last": 0.01, "start": 0.5}, oscillation_momentum=0.1)
    hooks = QatHooks(model, section, 10)
    counts = []
    for step in range(1, 11):
        shake(model, 1.0, step)
        hooks.stepped(step / 10, dict(model.state_dict()))
        progress, frequency = step / 10, hooks.tracker.frequency
        threshold = 0.01 + 0.49 * (1 + math.cos(math.pi * (progress - 0.5) / 0.5)) / 2
        low = torch.cat([torch.full((c.weight.numel(),), c.quantizer.spec.bits <= 4) for c in model.convs().values()])
        if progress >= 0.5:
            assert hooks.tracker.frozen[low & (frequency > threshold + 1e-6)].all()
        counts.append(int(hooks.tracker.frozen.sum()))
    assert counts[:4] == [0] * 4 and counts == sorted(counts) and counts[-1] > 1000 > counts[4]


def test_roundings_are_learned_from_start_to_end(model):
    """Weights are caught step by step, their undecidedness costs more and more, and in the end all are integers."""
    rounding = {"start": 0.5, "end": 0.8, "frequency": 0.05, "regularizer": 0.2}
    hooks = QatHooks(model, TrainSection(rounding=rounding, oscillation_momentum=0.1), 10)
    tracker, told, counts = hooks.tracker, [], []
    for step in range(1, 11):
        told.append(hooks.gradients_ready((step - 1) / 10).get("rounding"))
        shake(model, 1.0, step)
        hooks.stepped(step / 10, dict(model.state_dict()))
        counts.append((int(tracker.caught.sum()), int(tracker.frozen.sum())))
        if 0.5 <= step / 10 < 0.8:
            low = torch.cat(
                [torch.full((c.weight.numel(),), c.quantizer.spec.bits <= 4) for c in model.convs().values()]
            )
            assert torch.equal(tracker.caught, tracker.caught | (low & (tracker.frequency > 0.05)))
    caught = [count for count, _ in counts]
    assert caught[:4] == [0] * 4 and 100 < caught[4] <= caught[5] <= caught[6] and caught[7:] == [0] * 3
    assert [frozen for _, frozen in counts] == [0] * 7 + [caught[6]] * 3
    assert told[:6] == [None] * 6 and 0 < told[6] < told[7] and told[8:] == [0.0, 0.0]


def test_the_logits_of_roundings_have_a_group_of_their_own(model):
    section = TrainSection(rounding={"start": 0.5, "lr": 0.08}, final_lr=0.0, weight_decay=0.1)
    recipe = SimpleNamespace(train=section)
    plain = parameter_groups(model, recipe)
    hooks = QatHooks(model, section, 10)
    *others, logits = parameter_groups(model, recipe)
    assert [[id(p) for p in group.parameters] for group in others] == [[id(p) for p in g.parameters] for g in plain]
    assert [id(p) for p in logits.parameters] == [id(p) for p in hooks.tracker.logits]
    assert logits.weight_decay == 0.0
    assert logits.lr * Schedule.of(section).factor(15, 10) == pytest.approx(0.08)


def test_a_step_clamps_before_it_counts(model):
    hooks, conv = QatHooks(model, TrainSection(), 10), model.convs()["model.1.conv"]
    with torch.no_grad():
        conv.quantizer.scale.fill_(-1.0)
    hooks.stepped(0.1, {})
    assert conv.quantizer.scale.item() == pytest.approx(MIN_SCALE)
    place = next(layer for layer in hooks.tracker.layers if layer.conv is conv)
    ends = torch.where(conv.weight > 0, 7, -8).flatten()  # of so fine a grid
    assert torch.equal(hooks.tracker.integer[place.start : place.end], ends.to(torch.int8))


# --- traces ---


def record(traces, model, tracker, ema, steps):
    """Some steps at the end of a run."""
    for step in steps:
        shake(model, 0.5, step)
        tracker.update()
        traces.record(0.99, ema.shadow)
        ema.update()


@pytest.mark.parametrize("at", [0, 1, 3])
def test_traces_go_on_where_they_were_saved(make_detector, make_prepared, at):
    """`at` steps before the break; with none, nothing has been chosen yet."""
    told = []
    for broken in (False, True):
        model = make_prepared(make_detector("yolov5", seed=3))
        tracker, ema = OscillationTracker(model, 0.1), Ema(model, 0.9, 1.0)
        traces = Traces(model, tracker, 6)
        record(traces, model, tracker, ema, range(at))
        if broken:
            saved = {name: value.clone() for name, value in traces.tensors().items()}
            assert bool(saved) == (at > 0)
            traces = Traces(model, tracker, 6)
            traces.restore(saved)
        record(traces, model, tracker, ema, range(at, 6))
        told.append(traces.to_json())
    assert told[0] == told[1]
    assert len(told[0]) == LAYERS and all(len(entry["raw"]["weight"]) == 6 for entry in told[0])


def test_a_row_holds_scales_and_a_latent_weight_raw_and_averaged(model):
    tracker, ema = OscillationTracker(model, 0.1), Ema(model, 0.9, 1.0)
    shake(model, 0.5, 0)
    tracker.update()
    shake(model, 0.5, 1)
    tracker.update()
    ema.update()
    traces = Traces(model, tracker, 10)
    traces.record(0.95, ema.shadow)
    for entry in traces.to_json():
        conv, name = model.convs()[entry["layer"]], entry["layer"]
        group = model.placement.groups[model.placement.inputs[name]]
        for kind, state in (("raw", model.state_dict()), ("ema", ema.shadow)):
            scale = state[f"graph.{name}.quantizer.scale"].item()
            latent = state[f"graph.{name}.weight"].flatten()[entry["weight_index"]].item()
            found = entry[kind]
            assert found["weight_scale"] == [pytest.approx(scale)]
            assert found["weight"] == [pytest.approx(latent / scale, rel=1e-5)]
            assert found["input_scale"] == [pytest.approx(state[f"graph.quantizers.{group}.scale"].item())]
        assert entry["raw"]["weight"] != entry["ema"]["weight"]
        assert 0 <= entry["weight_index"] < conv.weight.numel()


def test_the_start_of_a_long_run_is_not_recorded(model):
    traces = Traces(model, OscillationTracker(model, 0.1), 3000)
    for progress in (0.0, 0.5, 0.89):
        traces.record(progress, dict(model.state_dict()))
    assert traces.to_json() == [] and traces.tensors() == {}
    traces.record(0.91, dict(model.state_dict()))
    assert len(traces.to_json()) == LAYERS
