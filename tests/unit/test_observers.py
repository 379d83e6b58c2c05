import numpy as np
import pytest
import torch

from qyolo_deploy.graph.fake_quantize import zero_point_of
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.observers import calibrate, refine_outputs, search_range
from qyolo_deploy.graph.prepare import prepare
from qyolo_deploy.graph.ranges import Sample, observe
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

SPECS = [QuantSpec(2), QuantSpec(4), QuantSpec(8), QuantSpec(4, signed=False), QuantSpec(8, signed=False)]
SPECS += [QuantSpec(3, narrow_range=True)]
OBSERVERS = ["mse", "minmax", "moving_average", "percentile", "entropy"]


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
        if group.endswith("sigmoid"):  # the whole sigmoid, whatever was seen of it
            assert (quantizer.scale, quantizer.offset) == (1 / 256, 0)
            continue
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


# --- the observers ---


def some_batches():
    """Batches that grow, with rare outliers; what a network's SiLU might give."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(0, 1 + number, (4, 5, 20, 20)) for number in range(4)]
    batches[1].flat[7], batches[2].flat[9] = 60.0, -45.0
    return [batch.astype(np.float32) for batch in batches]


def sample_of(batches):
    sample, generator = Sample(), torch.Generator().manual_seed(0)
    for batch in batches:
        sample.add(torch.tensor(batch), generator)
    return sample


def ends_of(observer, sample, spec):
    """The clipping range: of unsigned grids both ends, of signed ones the upper."""
    scale, offset = observe(observer, sample, spec)
    assert scale.shape == offset.shape == (1,)
    if spec.signed:
        assert offset == 0
        return scale.item() * spec.qmax
    return offset.item(), offset.item() + scale.item() * spec.qmax


@pytest.mark.parametrize("bits", [4, 8])
def test_minmax_takes_the_extremes_of_all(bits):
    batches = some_batches()
    low, high = min(batch.min() for batch in batches), max(batch.max() for batch in batches)
    assert ends_of("minmax", sample_of(batches), QuantSpec(bits, signed=False)) == pytest.approx((low, high))
    assert ends_of("minmax", sample_of(batches), QuantSpec(bits)) == pytest.approx(max(-low, high))


def test_the_moving_average_follows_extremes_with_a_tenth():
    batches = some_batches()
    low, high = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        low, high = 0.9 * low + 0.1 * batch.min(), 0.9 * high + 0.1 * batch.max()
    assert ends_of("moving_average", sample_of(batches), QuantSpec(8, signed=False)) == pytest.approx((low, high))


def test_percentiles_are_those_of_the_values_seen():
    sample = sample_of(some_batches())
    low, high = np.quantile(np.concatenate(sample.values), [0.0001, 0.9999])
    found = ends_of("percentile", sample, QuantSpec(8, signed=False))
    assert found == pytest.approx((low, high), rel=1e-4)
    assert found[1] < 20 < 60  # the outlier is left out


def test_the_sample_is_of_the_values_and_as_large_as_promised():
    batches = some_batches()
    sample = sample_of(batches)
    for values, batch in zip(sample.values, batches, strict=True):
        assert values.shape == (4096,) and np.isin(values, batch).all()
        assert values.std() == pytest.approx(batch.std(), rel=0.1)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("sign", [1, -1])
def test_zero_belongs_to_every_range(observer, sign):
    rng = np.random.default_rng(1)
    sample = sample_of([sign * rng.uniform(3, 5, (2, 3, 10, 10)).astype(np.float32)])
    low, high = ends_of(observer, sample, QuantSpec(8, signed=False))
    assert low <= 0 <= high
    assert (high if sign > 0 else -low) == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_grids_without_an_offset_start_at_zero(observer):
    sample = sample_of(some_batches()[:1])
    sample.cut_below_zero()
    low, high = ends_of(observer, sample, QuantSpec(8, signed=False))
    assert low == 0
    assert 2.5 < high < 5


def divergence(values, low, end, levels):
    """KL of Migacz 2017 in numpy: 2048 bins, clipped values counted in the last one, `levels` of equal width."""
    counts, _ = np.histogram(np.clip(values, low, end), 2048, (low, end))
    inside, _ = np.histogram(values[values <= end], 2048, (low, end))
    told = np.zeros(2048)
    for part in np.array_split(np.arange(2048), levels):
        filled = part[inside[part] > 0]
        if len(filled):
            told[filled] = inside[part].sum() / len(filled)
    p, q = counts / counts.sum(), told / told.sum()
    return sum(a * np.log(a / max(b, 1e-9)) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy_finds_the_end_with_the_least_divergence(bits):
    sample = sample_of([np.abs(batch) for batch in some_batches()[:2]])
    values, high = np.concatenate(sample.values), 60.0
    low, end = ends_of("entropy", sample, QuantSpec(bits, signed=False))
    assert low == 0
    told = {share: divergence(values, 0.0, high * share / 100, 2**bits) for share in range(1, 101)}
    assert told[round(end / high * 100)] <= min(told.values()) * 1.01
    assert end < 0.3 * high or bits == 8  # 16 levels cannot hold the outlier too


@pytest.mark.parametrize("observer", OBSERVERS)
def test_calibration_takes_every_observer(observer, small_network, images):
    """Grids without an offset, which nothing may give one, and weights that leave out the lowest level."""
    scheme = QuantScheme(QuantSpec(4, narrow_range=True), QuantSpec(8, signed=False), offset=False)
    model = prepare(small_network(), scheme)
    calibrate(model, [images[:1], images[1:]], observer=observer)
    read = {model.placement.groups[source] for source in model.placement.inputs.values()}
    assert {"images"} < read
    for group, quantizer in model.quantizers().items():
        if group in read:
            assert not quantizer.offset.requires_grad and quantizer.offset == 0, group
        assert 0 < quantizer.scale < 1, group
    layers = freeze(model, {}).layers
    assert {int(layer.weight.min()) for layer in layers.values() if layer.qparams.spec.bits == 4} == {-7}
    assert all(layer.weight.min() >= -127 for layer in layers.values())
