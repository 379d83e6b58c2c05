"""Oscillations against Nagel et al. 2022, section 2.2 (counting), 4.2 (dampening) and 4.3 (freezing)."""

import numpy as np
import pytest
import torch
from helpers.oscillation import flipping, follow, make_model, set_latent
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qyolo_deploy.graph.fake_quantize import GradientRules
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.qat import oscillation as module
from qyolo_deploy.qat.oscillation import OscillationTracker, dampen, falling, rising
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec


def by_hand(integers, momentum):
    """Frequency, direction and mean of one weight."""
    last, direction, frequency, mean = integers[0], 0, 0.0, float(integers[0])
    for now in integers[1:]:
        turned = now != last and direction != 0 and (now > last) != (direction > 0)
        frequency = momentum * turned + (1 - momentum) * frequency
        mean = momentum * now + (1 - momentum) * mean
        if now != last:
            direction = 1 if now > last else -1
        last = now
    return frequency, direction, mean


LEVELS = st.tuples(*[st.integers(-8, 7)] * 6, *[st.integers(-128, 127)] * 4)


@settings(max_examples=40)
@given(
    walk=st.lists(LEVELS, min_size=2, max_size=12),
    momentum=st.sampled_from([0.001, 0.01, 0.3]),
    within=st.floats(-0.4, 0.4),
)
@example(walk=[(0,) * 10, (1,) * 10, (1,) * 10, (0,) * 10, (7,) * 10, (-8,) * 10], momentum=0.01, within=0.4)
def test_a_walk_is_counted_as_by_hand(walk, momentum, within):
    tracker = follow(make_model(), [np.array(row) + within for row in walk], momentum)
    expected = [by_hand([row[index] for row in walk], momentum) for index in range(10)]
    frequency, direction, mean = zip(*expected, strict=True)
    np.testing.assert_array_equal(tracker.direction, direction)
    np.testing.assert_array_equal(tracker.integer, walk[-1])
    np.testing.assert_allclose(tracker.frequency, frequency, atol=1e-6)
    np.testing.assert_allclose(tracker.mean, mean, rtol=1e-5, atol=1e-4)


def test_values_beyond_the_grid_do_not_oscillate():
    tracker = follow(make_model(), [[limit] * 10 for limit in (130, 200, 140, 300)], 0.5)
    assert tracker.integer.tolist() == [7] * 6 + [127] * 4
    assert tracker.direction.tolist() == [0] * 10


def test_compiled_and_eager_counting_agree(monkeypatch):
    walk = np.random.default_rng(0).integers(-8, 8, (40, 10))
    compiled = follow(make_model(), walk, 0.01).state_dict()
    monkeypatch.setattr(module, "kernel", lambda function: function)
    eager = follow(make_model(), walk, 0.01).state_dict()
    for name, value in eager.items():
        if value.is_floating_point():
            torch.testing.assert_close(compiled[name], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(compiled[name], value)


# --- freezing ---


def test_what_flips_is_frozen_at_its_mean_for_good():
    model = make_model()
    tracker = follow(model, flipping(), 0.2)
    tracker.freeze(0.05)
    assert tracker.frozen.tolist() == [True, True] + [False] * 8  # 8 bits flip as often, and are left alone
    assert (tracker.frequency[6:] > 0.05).all()
    low = model.convs()["low"]
    assert by_hand([row[0] for row in flipping()], 0.2)[2] == pytest.approx(2.658, abs=0.001)  # and ends at 2
    set_latent(model, [-7.0] * 10)
    expected = torch.tensor([3.0, 3.0, -7, -7, -7, -7]) * low.quantizer.scale
    torch.testing.assert_close(low.quantized_weight().flatten(), expected)
    for level in (-7.0, 5.0, -7.0, 5.0, -7.0):
        set_latent(model, [level] * 10)
        tracker.update()
    tracker.freeze(0.05)  # now the others flip; what was frozen stays where it is
    assert tracker.frozen.tolist() == [True] * 6 + [False] * 4
    assert tracker.frozen_integer[:2].tolist() == tracker.integer[:2].tolist() == [3, 3]


def test_the_threshold_is_exceeded_not_reached():
    model = make_model()
    tracker = follow(model, flipping(), 0.2)
    tracker.freeze(tracker.frequency.max().item())
    assert not tracker.frozen.any() and model.convs()["low"].frozen is None


def test_a_resumed_run_attaches_what_it_loads():
    model = make_model()
    tracker = follow(model, flipping(), 0.2)
    tracker.freeze(0.05)
    set_latent(model, [-7.0] * 10)
    other = make_model()
    set_latent(other, [-7.0] * 10)
    resumed = OscillationTracker(other, 0.2)
    resumed.load_state_dict(tracker.state_dict())
    resumed.attach()
    assert torch.equal(other.convs()["low"].quantized_weight(), model.convs()["low"].quantized_weight())
    for each, counts in ((model, tracker), (other, resumed)):
        set_latent(each, [1.0] * 10)
        counts.update()
        counts.freeze(0.01)
    for name, value in tracker.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_baking_keeps_the_integers(granularity, small_network, images, make_prepared):
    axis = 0 if granularity == "per_channel" else None
    scheme = QuantScheme(QuantSpec(4, granularity=granularity, axis=axis), QuantSpec(8, signed=False))
    model = make_prepared(small_network(), scheme)
    tracker = OscillationTracker(model, 0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        with torch.no_grad():
            for conv in model.convs().values():
                noise = torch.randn(conv.weight.shape, generator=generator)
                conv.weight.add_(noise * conv.weight_scale())
        tracker.update()
    tracker.freeze(0.4)
    expected = {name: conv.quantized_weight() / conv.weight_scale() for name, conv in model.convs().items()}
    latent = freeze(model, {})
    tracker.bake()
    baked, turned = freeze(model, {}), 0
    for name, values in expected.items():
        np.testing.assert_array_equal(baked.layers[name].weight, values.detach().round().numpy())
        turned += (baked.layers[name].weight != latent.layers[name].weight).sum()
    assert turned > 20 and all(conv.frozen is None for conv in model.convs().values())


@pytest.mark.parametrize("rules", [GradientRules(), GradientRules(lsq_scale=True)], ids=["plain", "lsq scale"])
def test_frozen_weights_do_not_learn_but_their_scale_does(rules):
    """Of `s * integer`, the integer is the derivative to s; the rest follows LSQ."""
    model = make_model()
    tracker = follow(model, flipping(), 0.2)
    tracker.freeze(0.05)
    levels = np.array([-2.3, 6.6, 3.3, -12.0, 9.5, 0.4, 0, 0, 0, 0])
    set_latent(model, levels)
    conv, grad = model.convs()["low"], np.array([0.5, -2.0, 1.0, 3.0, -1.5, 0.25], np.float32)
    conv.quantizer.rules = rules
    conv.quantized_weight().backward(torch.tensor(grad).view(conv.weight.shape))
    free = levels[:6]
    inside = (free > -8) & (free < 7)
    to_scale = np.where(inside, np.rint(free) - free, np.clip(free, -8, 7))
    to_scale[:2] = 3
    inside[:2] = False
    np.testing.assert_array_equal(conv.weight.grad.flatten(), grad * inside)
    factor = 1 / np.sqrt(6 * 7) if rules.lsq_scale else 1.0
    assert conv.quantizer.scale.grad.item() == pytest.approx((grad * to_scale).sum() * factor, rel=1e-4)


def test_shares_are_those_of_each_layer():
    tracker = follow(make_model(), flipping(), 0.2)
    tracker.freeze(0.05)
    shares = tracker.shares()
    assert shares["low"] == pytest.approx({"bits": 4, "weights": 6, "oscillating": 2 / 6, "frozen": 2 / 6})
    assert shares["high"] == pytest.approx({"bits": 8, "weights": 4, "oscillating": 1.0, "frozen": 0.0})


# --- dampening ---

DAMPED = np.array([-2.3, 6.6, 3.45, -12.0, 9.5, 0.4, 1.3, -5.2, 3.4, 9.9])


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_dampening_adds_the_gradient_of_its_loss(granularity):
    model, weight = make_model(granularity), 0.03
    set_latent(model, DAMPED)
    conv, high = model.convs().values()
    for each in (conv, high):
        each.weight.grad = torch.full_like(each.weight, 0.5)
    value = dampen(model, weight)

    scale = conv.weight_scale().detach().double()
    latent = conv.weight.detach().double().requires_grad_()

    def loss(latent):
        held = torch.round(torch.clamp(conv.weight.detach().double() / scale, -8, 7)) * scale
        return weight * (held - torch.clamp(latent, -8 * scale, 7 * scale)).square().sum()

    loss(latent).backward()
    assert value == pytest.approx(loss(latent).item(), rel=1e-4)
    torch.testing.assert_close(conv.weight.grad.double(), 0.5 + latent.grad, rtol=1e-4, atol=1e-6)
    for index in np.ndindex(*conv.weight.shape):
        up, down = latent.detach().clone(), latent.detach().clone()
        up[index] += 1e-6
        down[index] -= 1e-6
        slope = (loss(up) - loss(down)).item() / 2e-6
        assert conv.weight.grad[index].item() == pytest.approx(0.5 + slope, abs=1e-5)
    assert conv.quantizer.scale.grad is None
    assert torch.equal(high.weight.grad, torch.full_like(high.weight, 0.5))  # 8 bits


def test_layers_without_a_gradient_are_not_dampened():
    model = make_model()
    set_latent(model, DAMPED)
    assert dampen(model, 1.0) == 0.0
    assert model.convs()["low"].weight.grad is None


# --- schedules ---


def test_schedules_are_half_cosines_between_their_ends():
    assert [rising(at, 0.004, 0.25) for at in (0.0, 0.1, 0.25)] == [0.0, 0.0, 0.0]
    assert rising(0.625, 0.004, 0.25) == pytest.approx(0.002)
    assert rising(1.0, 0.004, 0.25) == pytest.approx(0.004)
    assert falling(0.2499, 0.04, 0.01, 0.25) is None
    assert falling(0.25, 0.04, 0.01, 0.25) == pytest.approx(0.04)
    assert falling(0.625, 0.04, 0.01, 0.25) == pytest.approx(0.025)
    assert falling(1.0, 0.04, 0.01, 0.25) == pytest.approx(0.01)
    assert falling(0.0, 0.04, 0.01, 0.0) == pytest.approx(0.04)
    # A quarter of the way a cosine has come a share of (1 - cos 45°) / 2.
    assert rising(0.25, 1.0, 0.0) == pytest.approx(0.1464466)
    assert falling(0.25, 1.0, 0.0, 0.0) == pytest.approx(1 - 0.1464466)
