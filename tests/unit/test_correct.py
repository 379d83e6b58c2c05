from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.training import IMGSZ
from torch import nn

from qyolo_deploy.data.letterbox import to_tensor
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.prepare import prepare
from qyolo_deploy.graph.simulate import simulate
from qyolo_deploy.qat.train import calibrated
from qyolo_deploy.qc.correct import correct, corrections
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec
from qyolo_deploy.recipe import CorrectSection, Recipe


class OneLayer(nn.Module):
    """A whole network of one convolution."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return (self.conv(x),)


@pytest.fixture
def layer():
    """A convolution with weights of 2 bits: its float output, and the model that is to come near it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    scheme = QuantScheme(QuantSpec(2), QuantSpec(8, signed=False), first_last_bits=2)
    model = prepare(SimpleNamespace(core=OneLayer(conv).eval(), spec=SimpleNamespace(to_json=dict)), scheme)
    model.set_activations(False)
    with torch.no_grad():
        model.convs()["conv"].quantizer.scale.fill_(float(conv.weight.abs().max()) / 1.5)
    images = torch.rand(8, 3, 12, 12)
    return conv(images).detach(), model, images


def regression(h, y):
    """Gain and shift of the least squared error, by numpy."""
    design = np.stack([h, np.ones_like(h)], 1)
    return np.linalg.lstsq(design, y, rcond=None)[0]


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_what_learns_reaches_the_least_squares(layer, granularity):
    wanted, model, images = layer
    conv = model.convs()["conv"]
    with torch.no_grad():
        before = model(images)[0].double().numpy()
    optimizer = torch.optim.Adam(corrections(model, CorrectSection(granularity=granularity)), lr=0.02)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1500)
        optimizer.zero_grad()
        torch.square(model(images)[0] - wanted).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = model(images)[0].double().numpy()
    channels = [[0], [1], [2], [3]] if granularity == "per_channel" else [[0, 1, 2, 3]]
    bias = conv.beta.detach().double().numpy()[:, None, None]
    for own in channels:
        # A layer without batch normalisation has its bias inside; one gain and one shift stand behind the sum.
        gain, shift = regression(before[:, own].ravel(), wanted.double().numpy()[:, own].ravel())
        np.testing.assert_allclose(found[:, own], gain * before[:, own] + shift, atol=2e-3)
    assert np.abs(found - before).max() > 0.05
    assert bias.any()


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize(
    ("learn", "moving"), [("gain", {"log_gain"}), ("shift", {"shift"}), ("both", {"log_gain", "shift"})]
)
def test_nothing_else_moves(make_detector, train_scenes, tmp_path, learn, moving, granularity):
    detector = make_detector("yolov5", seed=2)
    recipe = recipe_with(learn=learn, granularity=granularity)
    model = calibrated(detector, train_scenes, recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    history = correct(model, detector, train_scenes, recipe, checkpoint=tmp_path / "c", key="k")
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    layers = [name for name, conv in model.convs().items() if conv.quantizer is not None]
    assert {name.rsplit(".", 1)[1] for name in moved} == moving
    assert {name.removeprefix("graph.").rsplit(".", 1)[0] for name in moved} == set(layers)
    for name in moved:
        steps = model.state_dict()[name] - before[name]
        shared = float(steps.max() - steps.min()) <= 1e-6
        assert shared == (granularity == "per_tensor"), name
    assert all(entry["images_per_s"] > 0 for entry in history)


def recipe_with(**section):
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"architecture": "x", "imgsz": IMGSZ},
            "data": {"source": "synthetic", "calibration_images": 8},
            "quantization": {"weights": {"bits": 4}, "start": "ranges"},
            "train": {"batch": 4, "epochs": 0},
            "correct": {"images": 12, "batch": 4, "epochs": 6, "lr": 0.01, **section},
        }
    )


@pytest.fixture(scope="module")
def corrected(make_detector, train_scenes, tmp_path_factory):
    """A model that only had range search, before and after its correction."""
    detector, recipe = make_detector("yolov5", seed=2), recipe_with()
    model = calibrated(detector, train_scenes, recipe)
    before = freeze(model, {})
    history = correct(model, detector, train_scenes, recipe, checkpoint=tmp_path_factory.mktemp("c") / "c", key="k")
    return detector, model, before, freeze(model, {}), history


def test_correction_lowers_its_loss_after_mere_range_search(corrected):
    *_, history = corrected
    losses = [entry["loss"] for entry in history]
    assert losses[-1] < 0.9 * losses[0]


def test_correction_leaves_the_integers_and_makes_scales_per_channel(corrected):
    _, model, before, after, _ = corrected
    assert model.scheme.weights.granularity == "per_tensor"
    for name, layer in after.layers.items():
        np.testing.assert_array_equal(layer.weight, before.layers[name].weight)
        gain = np.exp(model.convs()[name].log_gain.detach().double().numpy())
        np.testing.assert_allclose(layer.qparams.scale, before.layers[name].qparams.scale * gain, rtol=1e-6)
        assert np.ptp(gain) > 0.01, name


def test_the_folded_model_detects_what_the_corrected_one_does(corrected, train_scenes):
    from qyolo_deploy.data.images import read_image

    detector, model, before, after, _ = corrected
    images = torch.cat([torch.from_numpy(to_tensor(read_image(r.path))) for r in train_scenes.images])
    with torch.no_grad():
        learned = detector.decode(model(images))
        folded = simulate(detector, after)(images)
        uncorrected = simulate(detector, before)(images)
    # Between the two stand biases rounded to steps of the accumulator, which flip a code here and there.
    assert (learned - folded)[:, 4:].abs().mean() < 0.05 * (learned - uncorrected)[:, 4:].abs().mean()
