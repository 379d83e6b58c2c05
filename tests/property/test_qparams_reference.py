"""`QParams` against arithmetic on fractions, which rounds only where the definition says so."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantSpec

SPECS = st.builds(QuantSpec, bits=st.integers(2, 8), signed=st.booleans())
SCALES = st.floats(2.0**-20, 2.0**10, width=32)
REALS = st.floats(-(2.0**20), 2.0**20, width=32)


def to_float32(exact):
    """The float32 nearest to a fraction, ties to the even mantissa."""
    near = np.float32(float(exact))
    candidates = {float(near), *(float(np.nextafter(near, np.float32(end))) for end in (-np.inf, np.inf))}

    def rank(value):
        return abs(Fraction(value) - exact), int(np.float32(value).view(np.uint32)) & 1

    return Fraction(min((value for value in candidates if math.isfinite(value)), key=rank))


@settings(max_examples=400)
@given(spec=SPECS, scale=SCALES, data=st.data())
def test_quantize_is_the_definition(spec, scale, data):
    zero_point = data.draw(st.integers(spec.qmin, spec.qmax))
    steps = data.draw(st.integers(-300, 300))
    near_tie = np.float32((steps + 0.5) * scale)
    real = data.draw(st.one_of(REALS, st.just(float(near_tie)), st.just(float(np.float32(steps * scale)))))
    quotient = to_float32(Fraction(real) / Fraction(scale))
    expected = min(max(round(quotient) + zero_point, spec.qmin), spec.qmax)  # round() of a fraction: half to even
    qparams = QParams.of(spec, scale, zero_point)
    assert int(qparams.quantize(np.array([real], np.float32))[0]) == expected


@settings(max_examples=300)
@given(spec=SPECS, scale=SCALES, data=st.data())
def test_dequantize_is_the_definition(spec, scale, data):
    zero_point, integer = (data.draw(st.integers(spec.qmin, spec.qmax)) for _ in range(2))
    expected = to_float32((integer - zero_point) * Fraction(scale))
    found = QParams.of(spec, scale, zero_point).dequantize(np.array([integer], np.int32))
    assert Fraction(float(found[0])) == expected


@settings(max_examples=200)
@given(spec=SPECS, scale=SCALES, data=st.data())
def test_fake_quantize_is_idempotent_and_near(spec, scale, data):
    zero_point = data.draw(st.integers(spec.qmin, spec.qmax))
    real = np.array(data.draw(st.lists(REALS, min_size=1, max_size=8)), np.float32)
    qparams = QParams.of(spec, scale, zero_point)
    once = qparams.fake_quantize(real)
    np.testing.assert_array_equal(qparams.fake_quantize(once), once)
    low, high = ((end - zero_point) * Fraction(scale) for end in (spec.qmin, spec.qmax))
    for before, after in zip(real.tolist(), once.tolist(), strict=True):
        if low <= Fraction(before) <= high:
            # Half a step, and what float32 loses in the quotient and in the product.
            slack = 1 + Fraction(1, 2**12)
            assert abs(Fraction(after) - Fraction(before)) <= Fraction(scale) / 2 * slack


@settings(max_examples=100)
@given(
    spec=SPECS,
    scales=st.lists(SCALES, min_size=1, max_size=5),
    axis=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_channel_is_quantized_as_a_tensor_of_its_own(spec, scales, axis, seed):
    rng = np.random.default_rng(seed)
    shape = [2, 3, 4]
    shape[axis] = len(scales)
    real = (rng.normal(0, 8, shape) * max(scales)).astype(np.float32)
    points = rng.integers(spec.qmin, spec.qmax + 1, len(scales))
    whole = QParams.of(QuantSpec(spec.bits, spec.signed, False, "per_channel", axis), scales, points)
    for channel, (scale, point) in enumerate(zip(scales, points, strict=True)):
        alone = QParams.of(spec, scale, point)
        part = np.take(real, [channel], axis)
        np.testing.assert_array_equal(np.take(whole.quantize(real), [channel], axis), alone.quantize(part))
        np.testing.assert_array_equal(np.take(whole.fake_quantize(real), [channel], axis), alone.fake_quantize(part))
