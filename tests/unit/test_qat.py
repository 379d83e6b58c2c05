import pytest
import torch
from helpers.training import IMGSZ, Stop, assert_same_state, without_times

from qyolo_deploy.graph.fake_quantize import MIN_SCALE, Quantizer
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.layers import MIN_GAMMA, QuantConv
from qyolo_deploy.qat.train import train_qat
from qyolo_deploy.qat.train_float import train_float
from qyolo_deploy.recipe import Recipe
from qyolo_deploy.training.state import load_tensors


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
def qat(make_detector, train_scenes, tmp_path_factory):
    return run_qat(make_detector, train_scenes, tmp_path_factory.mktemp("qat") / "checkpoint")


def assert_same_result(left, right):
    assert_same_state(dict(left.raw), dict(right.raw))
    assert_same_state(left.model.state_dict(), right.model.state_dict())
    assert without_times(left.history) == without_times(right.history)
    assert left.diagnostics.to_json() == right.diagnostics.to_json()


def test_interrupted_quantization_aware_training_ends_the_same(qat, make_detector, train_scenes, tmp_path):
    with pytest.raises(Stop):
        run_qat(make_detector, train_scenes, tmp_path / "checkpoint", after=3)
    assert_same_result(run_qat(make_detector, train_scenes, tmp_path / "checkpoint"), qat)


# Within two steps, weights must have gone there and back.
OSCILLATING = {"lr": 0.03, "final_lr": 1.0, "warmup_epochs": 0.0, "oscillation_momentum": 0.3}
# Of six steps, weights are caught after the second to fifth, learn from the third on and are settled after the last.
ROUNDING = {**OSCILLATING, "epochs": 3, "rounding": {"start": 0.3, "end": 0.9, "frequency": 0.2, "lr": 0.1}}
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
def test_interrupted_training_of_every_kind_ends_the_same(make_detector, train_scenes, tmp_path, name):
    whole = run_qat(make_detector, train_scenes, tmp_path / "whole", train=SECTIONS[name])
    with pytest.raises(Stop):
        run_qat(make_detector, train_scenes, tmp_path / "cut", after=3, train=SECTIONS[name])
    if "freezing" in SECTIONS[name]:
        tensors, info = load_tensors(tmp_path / "cut")
        assert len(info["history"]) == 1 and tensors["raw/tracker.frozen"].sum() > 100
        assert any(layer["frozen"] > 0.01 for layer in whole.diagnostics.layers.values())
        assert all("dampening" in entry for entry in whole.history[1:])
    assert_same_result(run_qat(make_detector, train_scenes, tmp_path / "cut", train=SECTIONS[name]), whole)


def test_a_trained_model_needs_no_tracker(make_detector, train_scenes, tmp_path):
    """What was frozen lies in the weights, of the average and of the raw state."""
    result = run_qat(make_detector, train_scenes, tmp_path / "c", train=SECTIONS["freezing and dampening"])
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


@pytest.fixture(scope="module")
def rounded(make_detector, train_scenes, tmp_path_factory):
    """A run that learned roundings, and its checkpoint."""
    checkpoint = tmp_path_factory.mktemp("rounded") / "checkpoint"
    return run_qat(make_detector, train_scenes, checkpoint, train=ROUNDING), load_tensors(checkpoint)[0]


@pytest.mark.parametrize(("after", "learns"), [(3, False), (5, True)])
def test_interrupted_learning_of_roundings_ends_the_same(rounded, make_detector, train_scenes, tmp_path, after, learns):
    """Cut when weights are caught but no offset has learned yet, and when the optimizer knows their moments."""
    with pytest.raises(Stop):
        run_qat(make_detector, train_scenes, tmp_path / "cut", after=after, train=ROUNDING)
    tensors, info = load_tensors(tmp_path / "cut")
    assert len(info["history"]) == after // 2 and tensors["raw/tracker.caught"].sum() > 100
    count = len([name for name in tensors if name.startswith("raw/tracker.logits.")])
    moments, final = ({name for name in part if name.startswith("optimizer/")} for part in (tensors, rounded[1]))
    assert count and (moments == final) == learns
    assert_same_result(run_qat(make_detector, train_scenes, tmp_path / "cut", train=ROUNDING), rounded[0])


def test_learned_roundings_are_integers_of_both_states_that_freezing_the_model_gives(rounded):
    result, tensors = rounded
    mask, integers = tensors["raw/tracker.frozen"], tensors["raw/tracker.frozen_integer"]
    assert mask.sum() > 200 and not tensors["raw/tracker.caught"].any()
    assert result.model.tracker is None and not [name for name in result.raw if name.startswith("tracker")]
    turned = integers[mask] != tensors["raw/tracker.base"][mask]
    assert 0 < turned.sum() < len(turned) and any("rounding" in entry for entry in result.history)
    average = {name: value.clone() for name, value in result.model.state_dict().items()}
    try:
        for state in (dict(result.raw), average):
            result.model.load_state_dict(state)
            layers = freeze(result.model, {}).layers
            exported = torch.cat([torch.from_numpy(layers[name].weight).flatten() for name in result.model.convs()])
            assert torch.equal(exported[mask], integers[mask])
    finally:
        result.model.load_state_dict(average)
    shares = result.diagnostics.layers.values()
    assert sum(layer["frozen"] * layer["weights"] for layer in shares) == pytest.approx(float(mask.sum()))


def test_validation_during_training_sees_a_network_that_is_quantized_throughout(make_detector, train_scenes, tmp_path):
    """Also while only the backbone trains quantized, and by running statistics: scores must be of one kind."""
    seen = []

    def evaluate(model, detector):
        quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
        seen.append(all(quantizer.enabled for quantizer in quantizers))
        return float(all(conv.norm_momentum is None for conv in model.convs().values()))

    train = {"backbone_first": 0.9, "norm": "batch", "patience": 2}
    result = run_qat(make_detector, train_scenes, tmp_path / "c", evaluate=evaluate, train=train)
    assert seen == [True, True] and [entry["map50_95"] for entry in result.history] == [1.0, 1.0]


def test_bfloat16_leaves_quantizers_and_state_in_float32(
    qat, make_detector, make_prepared, train_scenes, images, tmp_path
):
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
    result = run_qat(make_detector, train_scenes, tmp_path / "c", train={"precision": "bfloat16"})
    assert {value.dtype for value in result.raw.values()} == {torch.float32}
    ours, exact = result.history[0]["loss"], qat.history[0]["loss"]  # before roundings lead the two runs apart
    assert ours != exact and ours == pytest.approx(exact, rel=0.1)


def test_training_moves_weights_scales_and_offsets_and_averages_them(qat, make_detector, train_scenes, tmp_path):
    untrained = {"epochs": 0, "batch": 4, "images": 8}
    start = run_qat(make_detector, train_scenes, tmp_path / "checkpoint", train=untrained).model.state_dict()
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


def test_interrupted_float_training_ends_the_same(make_detector, train_scenes, tmp_path):
    states = []
    for name, after in (("whole", None), ("cut", 3), ("cut", None)):
        detector = make_detector(seed=6)
        progress = Interrupter(after) if after else None
        try:
            history = train_float(
                detector, train_scenes, make_recipe(), checkpoint=tmp_path / name, key="k", progress=progress
            )
        except Stop:
            continue
        assert not detector.core.training
        assert all("labels" in entry for entry in history)
        states.append(detector.core.state_dict())
    assert_same_state(states[0], states[1])
    tracked = [value.item() for name, value in states[0].items() if name.endswith("num_batches_tracked")]
    assert set(tracked) == {1 + 4}  # what the fixture's one batch left, and two epochs of two
