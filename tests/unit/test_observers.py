import numpy as np
import pytest
import torch

from qyolo_deploy.graph.fake_quantize import zero_point_of
from qyolo_deploy.graph.observers import calibrate, refine_outputs, search_range
from qyolo_deploy.graph.prepare import prepare
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

SPECS = [QuantSpec(2), QuantSpec(4), QuantSpec(8), QuantSpec(4, signed=False), QuantSpec(8, signed=False)]


def rows_of_values():
    """Rows that want different ranges: normal, with outliers, one-sided, constant zero."""
    rng = np.random.default_rng(0)
    normal = rng.normal(0, 1, 3000)
    outliers = np.where(rng.random(3000) < 0.002, 40 * normal, normal)
    silu = normal * 3 / (1 + np.exp(-normal * 3))
    return np.stack([normal, outliers, np.abs(normal), -np.abs(normal), silu, 0 * normal]).astype(np.float32)


def error_of(row, scale, offset, spec):
    point = int(np.clip(np.rint(-np.float32(offset) / np.float32(scale)), spec.qmin, spec.qmax))
    return float(np.square(QParams.of(spec, scale, point).fake_quantize(row) - row, dtype=np.float64).mean())


def search(values, spec):
    low, high = values.min(1).clip(max=0), values.max(1).clip(min=0)
    scale, offset = search_range(torch.tensor(values), torch.tensor(low), torch.tensor(high), spec)
    return scale.numpy(), offset.numpy(), low, high


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_shrunk_range_of_either_kind_is_much_better(spec):
    """Against all pairs of ends in steps of 5 %, for signed grids all symmetric ranges in steps of 1 %."""
    values = rows_of_values()[:5]
    scale, offset, low, high = search(values, spec)
    for index, row in enumerate(values):
        if spec.signed:
            limit = max(-low[index], high[index])
            grids = [(limit * share / 100 / spec.qmax, 0.0) for share in range(1, 101)]
        else:
            shares = np.arange(5, 101, 5) / 100
            grids = [((high[index] * b - low[index] * a) / spec.qmax, low[index] * a) for a in shares for b in shares]
        best = min(error_of(row, *grid, spec) for grid in grids)
        full = error_of(row, *grids[-1], spec)
        found = error_of(row, scale[index], offset[index], spec)
        assert found <= full * (1 + 1e-5)
        # Signed grids are searched whole, unsigned ones end by end.
        assert found <= best * (1 + 1e-5 if spec.signed else 1.25)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_are_searched_alone_and_found_ranges_are_valid(spec):
    values = rows_of_values()
    scale, offset, _, _ = search(values, spec)
    for index, row in enumerate(values):
        alone_scale, alone_offset, _, _ = search(row[None], spec)
        assert (alone_scale[0], alone_offset[0]) == (scale[index], offset[index])
        assert np.isfinite(scale[index]) and scale[index] > 0
        assert offset[index] == 0 if spec.signed else offset[index] <= 0


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_calibration_sets_every_scale_and_nothing_else(small_network, images, granularity):
    axis = 0 if granularity == "per_channel" else None
    scheme = QuantScheme(QuantSpec(4, granularity=granularity, axis=axis), QuantSpec(8, signed=False))
    states = []
    for _ in range(2):
        model = prepare(small_network(), scheme)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        calibrate(model, [images[:1], images[1:]])
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert name.endswith(("scale", "offset")) or torch.equal(value, before[name]), name
    for group, quantizer in model.quantizers().items():
        point = zero_point_of(quantizer.scale, quantizer.offset, quantizer.spec.qmin, quantizer.spec.qmax)
        QParams.of(quantizer.spec, quantizer.scale.detach().numpy(), point.detach().numpy())
        assert quantizer.scale != 1.0, group
        assert quantizer.enabled
    for conv in model.convs().values():
        assert conv.quantizer.enabled and not (conv.quantizer.scale == 1.0).any()


def test_a_group_s_range_covers_all_of_its_tensors(small_network, make_scheme, images):
    model = prepare(small_network(), make_scheme(8))
    extremes = {}

    def look(group):
        def hook(_, inputs):
            low, high = extremes.get(group, (0.0, 0.0))
            extremes[group] = min(low, inputs[0].min().item()), max(high, inputs[0].max().item())

        return hook

    calibrate(model, [images])
    for group, quantizer in model.quantizers().items():
        quantizer.register_forward_pre_hook(look(group))
    model.set_activations(False)
    model.set_weights(False)
    with torch.no_grad():
        model(images)
    inner = model.placement.inner  # of what goes into a SiLU, only what comes out counts
    for group, (low, high) in extremes.items():
        quantizer = model.quantizers()[group]
        span, reach = quantizer.scale.item() * 255, high - low
        assert span <= reach * 1.001, group
        assert span >= 0.3 * reach or group in inner, group


def test_refining_keeps_zero_on_the_grids_of_heads_that_never_reach_it(small_network, make_scheme, images):
    """Class logits of a level without objects are all negative: the grid must still lie where they are."""
    detector = small_network()
    with torch.no_grad():
        detector.core.head_1.bias.fill_(40.0)
        detector.core.head_2.bias.fill_(-40.0)
    model = prepare(detector, make_scheme(8))
    calibrate(model, [images])

    def decode(maps):
        return torch.cat([raw.flatten() for raw in maps])

    refine_outputs(model, images, decode, torch.nn.functional.mse_loss)
    with torch.no_grad():
        exact = detector.core(images)
        for quantizer, raw in zip(model.output_quantizers(), exact, strict=True):
            span = quantizer.scale * 255
            assert -span <= quantizer.offset <= 0
            assert (quantizer(raw) - raw).abs().max() <= 0.1 * (raw.max() - raw.min()) + quantizer.scale
