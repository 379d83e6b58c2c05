"""Learned rounding: what is caught, where it starts, what drives it to integers, and what becomes of it."""

import numpy as np
import pytest
import torch
from helpers.oscillation import flipping, follow, make_model, set_latent

from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.qat.rounding import LearnedRounding, offset_of, penalty
from qyolo_deploy.training.ema import Ema


@pytest.fixture
def caught():
    """A model of ten weights of which the first two flip between 2 and 3 and were caught at 2.4 and 2.6."""
    model = make_model()
    tracker = follow(model, flipping(), 0.2, LearnedRounding)
    set_latent(model, [2.4, 2.6, *[-1.0] * 4, *[2.0] * 4])
    tracker.catch(0.05)
    return model, tracker


def levels(model, name="low"):
    """What a layer computes with, in steps."""
    conv = model.convs()[name]
    return (conv.quantized_weight() / conv.weight_scale()).flatten().detach().numpy()


def set_offsets(tracker, values):
    """Gives the low-bit layer's weights offsets inside -1 to 1."""
    with torch.no_grad():
        tracker.logits[0].copy_(torch.atanh(torch.tensor(values) / 1.1).view(tracker.logits[0].shape))


def test_offset_and_penalty_are_those_of_the_formula():
    t = np.linspace(-3, 3, 41)
    g = np.clip(1.1 * np.tanh(t), -1, 1)
    np.testing.assert_allclose(offset_of(torch.tensor(t)), g, rtol=1e-12)
    np.testing.assert_allclose(penalty(torch.tensor(g)), g**2 * (1 - g**2) ** 2, rtol=1e-12, atol=1e-15)
    assert abs(g[[0, -1]]).tolist() == [1.0, 1.0]


def test_what_oscillates_in_low_bits_is_caught_where_its_latent_value_is(caught):
    model, tracker = caught
    assert tracker.caught.tolist() == [True, True] + [False] * 8  # 8 bits flip as often, and are left alone
    assert tracker.base[:2].tolist() == [3, 3] and len(tracker.logits) == 1  # the mean is 2.66
    np.testing.assert_allclose(levels(model), [2.4, 2.6, -1, -1, -1, -1], rtol=1e-5)
    set_latent(model, [-7.0] * 10)  # which no longer matters
    np.testing.assert_allclose(levels(model), [2.4, 2.6, -7, -7, -7, -7], rtol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(levels(model), [2, 3, -7, -7, -7, -7], rtol=1e-6)
    assert tracker.current()[:2].tolist() == [2, 3]


def test_one_is_caught_once(caught):
    model, tracker = caught
    set_offsets(tracker, [0.25, -0.75, 0, 0, 0, 0])
    before = tracker.logits[0].clone()
    for level in (-7.0, 5.0, -7.0, 5.0, -7.0):
        set_latent(model, [level] * 10)
        tracker.update()
    tracker.catch(0.05)
    assert tracker.caught.tolist() == [True] * 6 + [False] * 4
    assert torch.equal(tracker.logits[0].flatten()[:2], before.flatten()[:2])
    assert tracker.integer[:2].tolist() == [3, 2]


def test_a_latent_value_far_from_the_mean_starts_a_step_away():
    model = make_model()
    tracker = follow(model, flipping(), 0.2, LearnedRounding)
    set_latent(model, [-20.0, 20.0, *[-1.0] * 8])
    tracker.catch(0.05)
    np.testing.assert_allclose(levels(model)[:2], [2, 4], rtol=1e-5)


@pytest.mark.parametrize(("base", "offset", "expected"), [(7, 0.9, 7), (-8, -0.9, -8), (7, -0.9, 6), (-8, 0.6, -7)])
def test_no_level_leaves_the_grid(caught, base, offset, expected):
    model, tracker = caught
    tracker.base[:2] = base
    set_offsets(tracker, [offset, offset, 0, 0, 0, 0])
    inside = np.clip(base + offset, -8, 7)
    np.testing.assert_allclose(levels(model)[:2], [inside] * 2, rtol=1e-5)
    tracker.settle()
    assert tracker.frozen_integer[:2].tolist() == [expected] * 2
    np.testing.assert_allclose(levels(model)[:2], [expected] * 2, rtol=1e-6)


def test_offsets_and_scale_learn_and_latent_values_do_not(caught):
    """Of `s (base + g(t))`, the level is the derivative to s and `s g'(t)` that to t."""
    model, tracker = caught
    conv, grad = model.convs()["low"], np.array([0.5, -2.0, 1.0, 3.0, -1.5, 0.25], np.float32)
    conv.quantized_weight().backward(torch.tensor(grad).view(conv.weight.shape))
    scale = conv.quantizer.scale.item()
    slope = 1.1 * (1 - (np.array([-0.6, -0.4]) / 1.1) ** 2)
    np.testing.assert_allclose(tracker.logits[0].grad.flatten()[:2], grad[:2] * scale * slope, rtol=1e-4)
    assert not tracker.logits[0].grad.flatten()[2:].any() and not conv.weight.grad.flatten()[:2].any()
    np.testing.assert_array_equal(conv.weight.grad.flatten()[2:], grad[2:])
    assert conv.quantizer.scale.grad.item() == pytest.approx(grad[0] * 2.4 + grad[1] * 2.6, rel=1e-4)


def test_the_regularizer_adds_the_gradient_of_its_penalty(caught):
    _, tracker = caught
    start = np.array([0.3, -0.8])
    set_offsets(tracker, [*start, 0.5, 0.5, 0.5, 0.5])
    tracker.logits[0].grad = torch.full_like(tracker.logits[0], 0.25)
    value = tracker.regularize(0.1)
    assert value == pytest.approx(0.1 * (start**2 * (1 - start**2) ** 2).sum(), rel=1e-5)
    t, step = np.arctanh(start / 1.1), 1e-6
    ends = [1.1 * np.tanh(t + sign * step) for sign in (1, -1)]
    up, down = (g**2 * (1 - g**2) ** 2 for g in ends)
    expected = [*(0.25 + 0.1 * (up - down) / (2 * step)), *[0.25] * 4]
    np.testing.assert_allclose(tracker.logits[0].grad.flatten(), expected, rtol=1e-4)


def test_the_regularizer_drives_offsets_to_integers(caught):
    """To the nearest within 1 / sqrt(3) of 0, else away from it; the loss may have carried them there."""
    _, tracker = caught
    tracker.caught[:6] = True
    set_offsets(tracker, [0.05, -0.5, 0.55, 0.62, -0.7, 0.97])
    optimizer = torch.optim.Adam(tracker.logits, lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        tracker.regularize(0.1)
        optimizer.step()
    np.testing.assert_allclose(offset_of(tracker.logits[0]).detach().flatten(), [0, 0, 0, 1, -1, 1], atol=0.02)


def test_settled_weights_are_frozen_at_what_they_had_become(caught):
    model, tracker = caught
    set_offsets(tracker, [-0.8, 0.3, 0, 0, 0, 0])
    tracker.settle()
    assert tracker.frozen.tolist() == [True] * 2 + [False] * 8 and not tracker.caught.any()
    assert tracker.frozen_integer[:2].tolist() == [2, 3]
    np.testing.assert_allclose(levels(model)[:2], [2, 3], rtol=1e-6)
    set_offsets(tracker, [0.9] * 6)
    tracker.settle()
    np.testing.assert_allclose(levels(model)[:2], [2, 3], rtol=1e-6)
    tracker.bake()
    model.tracker = None
    assert model.convs()["low"].frozen is None
    assert freeze(model, {}).layers["low"].weight.flatten().tolist() == [2, 3, -1, -1, -1, -1]


def test_a_run_that_ends_early_bakes_what_offsets_round_to(caught):
    model, tracker = caught
    set_offsets(tracker, [-0.8, 0.3, 0, 0, 0, 0])
    with torch.no_grad():
        seen = levels(model)
    tracker.bake()
    np.testing.assert_array_equal(freeze(model, {}).layers["low"].weight.flatten(), seen.round())


def test_a_resumed_run_takes_up_what_learns(caught):
    model, tracker = caught
    other = make_model()
    resumed = LearnedRounding(other, 0.2)
    resumed.load_state_dict(tracker.state_dict())
    other.load_state_dict(model.state_dict())
    resumed.attach()
    assert torch.equal(other.convs()["low"].quantized_weight(), model.convs()["low"].quantized_weight())
    tracker.settle()
    again = make_model()
    settled = LearnedRounding(again, 0.2)
    settled.load_state_dict(tracker.state_dict())
    again.load_state_dict(model.state_dict())
    settled.attach()
    assert torch.equal(again.convs()["low"].quantized_weight(), model.convs()["low"].quantized_weight())


def test_the_average_has_the_raw_state_s_decisions(caught):
    model, tracker = caught
    model.tracker = tracker
    ema = Ema(model, 0.9, 1.0)
    set_offsets(tracker, [0.7, -0.7, 0, 0, 0, 0])
    with torch.no_grad():
        model.convs()["low"].quantizer.scale.mul_(2)
    ema.update()
    names = [name for name in ema.shadow if name.startswith("tracker.")]
    assert {"tracker.caught", "tracker.base", "tracker.logits.0"} <= set(names)
    assert all(torch.equal(ema.shadow[name], model.state_dict()[name]) for name in names)
    assert ema.shadow["graph.low.quantizer.scale"] < model.convs()["low"].quantizer.scale
