"""One quantizer at a time: its cost beside a computation of its own, and the overrides that follow."""

import json
import math

import numpy as np
import pytest
import torch

from qyolo_deploy.data.dataset import take_images
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.graph.freeze import activation_qparams
from qyolo_deploy.graph.simulate import fold_float
from qyolo_deploy.recipe import Recipe
from qyolo_deploy.stages.sensitivity import Cost, Part, Sensitivity, override_lines, sensitivity_table
from qyolo_deploy.stages.sensitivity_kept import Kept
from qyolo_deploy.stages.sensitivity_measure import measure, parts_of

RECIPE = {
    "name": "x",
    "validate": {"rect": False},
    "model": {"architecture": "x", "imgsz": 64},
    "data": {"source": "x"},
}
LAYER, TENSOR = "model.2.cv1.conv", "model.4.cv1.act.mul"


@pytest.fixture(scope="module")
def recipe():
    return Recipe.model_validate(RECIPE)


@pytest.fixture(scope="module")
def scenes(train_scenes):
    return take_images(train_scenes, [0, 5])


@pytest.fixture(scope="module")
def batch(scenes):
    padded = [letterbox(read_image(image.path), 64, rect=False)[0] for image in scenes.images]
    return torch.from_numpy(np.concatenate([to_tensor(image) for image in padded]))


@pytest.fixture(scope="module")
def model(pico, make_prepared, batch):
    return make_prepared(pico, images=batch)


@pytest.fixture(scope="module")
def found(model, pico, scenes, recipe):
    return measure(model, pico, scenes, recipe)


def head_sqnr(view, changed, batch):
    """Over all head maps at once, of a folded float network and one with a change."""
    with torch.no_grad():
        left, right = (torch.cat([level.flatten() for level in core(batch)]).double() for core in (view, changed))
    return 10 * math.log10(float((left**2).sum() / ((left - right) ** 2).sum()))


def test_every_quantizer_is_a_part(model, found):
    parts = [cost.part for cost in found.costs]
    assert {part.name for part in parts if part.kind == "weights"} == set(model.placement.layers)
    assert {part.name for part in parts if part.kind == "activations"} == set(model.placement.specs)
    assert len(parts) == len(parts_of(model)) == len(set(parts))
    read = {layer for part in parts if part.kind == "activations" for layer in part.layers}
    assert read == set(model.placement.layers)
    assert [cost.sqnr_db for cost in found.costs] == sorted(cost.sqnr_db for cost in found.costs)
    assert all(cost.lost is None for cost in found.costs) and found.baseline is None
    assert all(quantizer.enabled for quantizer in parts_of(model).values())  # as it was


def test_weights_cost_what_rounding_them_alone_does(model, found, pico, batch):
    (cost,) = [cost for cost in found.costs if (cost.part.name, cost.part.kind) == (LAYER, "weights")]
    scale = model.convs()[LAYER].quantizer.scale.detach()
    view, changed = fold_float(pico).core, fold_float(pico)
    (norm,) = [m for n, m in pico.core.named_modules() if n == LAYER.replace(".conv", ".bn")]
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()[:, None, None, None]
    original = pico.core.get_submodule(LAYER).weight.detach()
    rounded = torch.clamp(torch.round(original / scale), -8, 7) * scale
    with torch.no_grad():
        # A negative gamma turns the grid around, whose ends are not the same.
        flipped = torch.clamp(torch.round(-original / scale), -8, 7) * -scale
        changed.core.get_submodule(LAYER).weight.copy_(torch.where(factor < 0, flipped, rounded) * factor)
    assert cost.sqnr_db == pytest.approx(head_sqnr(view, changed.core, batch), abs=0.1)


def test_activations_cost_what_rounding_them_alone_does(model, found, pico, batch):
    (cost,) = [cost for cost in found.costs if (cost.part.name, cost.part.kind) == (TENSOR, "activations")]
    qparams = activation_qparams(model.quantizers()[TENSOR])
    view, changed = fold_float(pico).core, fold_float(pico).core
    members = [name for name, group in model.placement.groups.items() if group == TENSOR]
    for name in members:
        if name not in model.placement.repeats:
            changed.get_submodule(name).register_forward_hook(
                lambda _, inputs, output: torch.from_numpy(qparams.fake_quantize(output.numpy()))
            )
    assert cost.sqnr_db == pytest.approx(head_sqnr(view, changed, batch), abs=0.1)


@pytest.mark.parametrize("metric", ["map", "loss"])
def test_map_and_loss_rank_by_what_is_lost(metric, model, pico, scenes, recipe, monkeypatch):
    few = dict(list(parts_of(model).items())[:3])
    monkeypatch.setattr("qyolo_deploy.stages.sensitivity_measure.parts_of", lambda _: few)
    steps = []
    found = measure(model, pico, scenes, recipe, metric, lambda *args: steps.append(args[:2]))
    lost = [cost.lost for cost in found.costs]
    assert lost == sorted(lost, reverse=True) and len(lost) == 3
    assert all(math.isfinite(value) for value in lost) and math.isfinite(found.baseline)
    assert metric == "map" or max(map(abs, lost)) > 0
    assert steps[-1] == (2 + 3 + 1, 2 + 3 + 1)
    assert sensitivity_table(found)[0][-1] == {"map": "mAP lost", "loss": "loss gained"}[metric]


class Stopped(Exception):
    """What a test interrupts a measurement by."""


def stop_at(step):
    def progress(done, *_):
        if done == step:
            raise Stopped

    return progress


@pytest.fixture
def calls(model):
    """Passes through the network, one entry each."""
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def test_an_interrupted_measurement_goes_on_where_it_stopped(model, found, pico, scenes, recipe, tmp_path, calls):
    path, passes = tmp_path / "measured.json", len(found.costs) + 1  # of each image: in float, and one for each part
    with pytest.raises(Stopped):
        measure(model, pico, scenes, recipe, "sqnr", stop_at(1), Kept(path, "model"))
    assert len(calls) == passes
    assert measure(model, pico, scenes, recipe, kept=Kept(path, "model")) == found
    assert len(calls) == 2 * passes  # the second image's alone were missing
    assert measure(model, pico, scenes, recipe, kept=Kept(path, "model")) == found
    assert len(calls) == 2 * passes


def test_what_decides_a_number_decides_what_is_measured_again(model, found, pico, scenes, recipe, tmp_path, calls):
    path = tmp_path / "measured.json"
    measure(model, pico, scenes, recipe, kept=Kept(path, "model"))
    calls.clear()
    scale = model.convs()[LAYER].quantizer.scale
    original = scale.detach().clone()
    with torch.no_grad():
        scale.mul_(1.25)
        changed = measure(model, pico, scenes, recipe, kept=Kept(path, "model"))
        scale.copy_(original)
    assert len(calls) == 2 * 2  # of each image the float maps, and those with the other grid
    before, after = ({cost.part: cost.sqnr_db for cost in one.costs} for one in (found, changed))
    assert [part.name for part in before if before[part] != after[part]] == [LAYER]
    calls.clear()
    measure(model, pico, take_images(scenes, [1]), recipe, kept=Kept(path, "model"))
    assert calls == []
    measure(model, pico, take_images(scenes, [1]), recipe, kept=Kept(path, "another"))
    assert len(calls) == len(found.costs) + 1


def test_a_broken_file_of_kept_numbers_is_begun_anew(tmp_path):
    path = tmp_path / "measured.json"
    for content in ("", "[]", "{}", '{"model": "m", "numbers": {"x": "y"}}', '{"model": "m", "numbers": 3}'):
        path.write_text(content)
        assert Kept(path, "m").number("what", lambda: 2.5) == 2.5
        assert Kept(path, "m").number("what", lambda: 9.0) == 2.5


@pytest.mark.parametrize("metric", ["map", "loss"])
def test_scores_are_kept_one_by_one(metric, model, pico, scenes, recipe, monkeypatch, tmp_path):
    few = dict(list(parts_of(model).items())[:3])
    monkeypatch.setattr("qyolo_deploy.stages.sensitivity_measure.parts_of", lambda _: few)
    path = tmp_path / "measured.json"
    with pytest.raises(Stopped):
        measure(model, pico, scenes, recipe, metric, stop_at(2 + 2), Kept(path, "model"))
    before = json.loads(path.read_text())["numbers"]
    found = measure(model, pico, scenes, recipe, metric, kept=Kept(path, "model"))
    after = json.loads(path.read_text())["numbers"]
    # Head maps of two images in float and with each part; the float model's score, and that of the first part.
    assert len(before) == 2 * (1 + 3) + 1 + 1 and len(after) == len(before) + 2
    assert before.items() <= after.items()
    assert found == measure(model, pico, scenes, recipe, metric)


def cost(name, kind, bits, layers, sqnr_db):
    return Cost(Part(name, kind, bits, layers), sqnr_db, None)


def test_overrides_raise_what_costs_most_and_leave_the_rest():
    costs = (
        cost("head", "activations", 8, (), 5.0),  # nothing to override
        cost("b", "weights", 4, ("b",), 10.0),
        cost("x", "activations", 4, ("a", "b"), 12.0),
        cost("c", "weights", 8, ("c",), 13.0),  # as many bits as there are
        cost("c", "weights", 3, ("c",), 14.0),
    )
    found = Sensitivity("sqnr", 1, None, costs, {"a": (4, 4), "b": (4, 4), "c": (3, 8)})
    head = ["quantization:", "  overrides:"]
    assert override_lines(found, 0) == []
    assert override_lines(found, 1) == [*head, "    b: {weights: 8, activations: 4}"]
    a, b = "    a: {weights: 4, activations: 8}", "    b: {weights: 8, activations: 8}"
    assert override_lines(found, 2) == [*head, b, a]
    assert override_lines(found, 9) == [*head, b, a, "    c: {weights: 8, activations: 8}"]
