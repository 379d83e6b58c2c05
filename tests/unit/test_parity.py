"""Sums over images beside the formulas over all values at once, and which tensor departs first."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qyolo_deploy.errors import InputError
from qyolo_deploy.validate.parity import EXACT_DB, Grid, Parity, TensorErrors, TensorParity

GRID = Grid(0.25, -8, 7)


def layer(name, sqnr_db=EXACT_DB, differing=0.0, values=100):
    return TensorParity(name, sqnr_db, 1.0, 0.0, None, differing, values)


def parity(*layers, both_quantized=True, threshold_db=20.0):
    return Parity("a", "b", 3, layers, both_quantized, threshold_db, {}, {})


def summed(pairs, reference=GRID, compared=GRID):
    errors = TensorErrors("x", reference, compared)
    for left, right in pairs:
        errors.add(left, right)
    return errors.result()


values = arrays.arrays(np.float32, (2, 3, 4), elements=st.floats(-3, 3, width=32))


@given(st.lists(st.tuples(values, values), min_size=1, max_size=4))
def test_sums_over_images_are_those_over_all_values(pairs):
    found = summed(pairs)
    left, right = (np.concatenate([pair[side].ravel() for pair in pairs]).astype(np.float64) for side in (0, 1))
    signal, noise = (left**2).sum(), ((left - right) ** 2).sum()
    if noise > 1e-6 and signal > 1e-6:
        assert found.sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)
        assert found.cosine == pytest.approx(
            left @ right / np.linalg.norm(left) / np.linalg.norm(right) if right.any() else 0.0, abs=1e-6
        )
    largest = np.abs(left - right).max()
    assert found.max_error == pytest.approx(largest, abs=1e-6)
    assert found.max_error_steps == pytest.approx(largest / 0.25, abs=1e-5)
    codes = [np.clip(np.rint(side / 0.25), -8, 7) for side in (left, right)]
    assert found.differing == np.mean(codes[0] != codes[1])
    assert found.values == left.size


def test_nothing_differs():
    ones = np.ones((1, 2), np.float32)
    found = summed([(ones, ones)])
    assert (found.sqnr_db, found.max_error, found.differing) == (EXACT_DB, 0.0, 0.0)
    assert found.cosine == pytest.approx(1.0)
    zeros = np.zeros_like(ones)
    assert summed([(zeros, zeros)]).cosine == 1.0
    assert summed([(zeros, ones)]).sqnr_db == -EXACT_DB and summed([(zeros, ones)]).cosine == 0.0


def test_a_float_value_has_the_code_that_the_grid_gives_it():
    rounded = np.array([0.25, 1.75, -2.0], np.float32)
    inside = np.array([0.3, 9.0, -40.0], np.float32)  # what the grid clips is no difference
    assert summed([(inside, rounded)], None, GRID).differing == 0
    assert summed([(inside + 0.25, rounded)], None, GRID).differing == pytest.approx(1 / 3)


def test_codes_of_different_grids_are_not_compared():
    ones = np.ones((1, 2), np.float32)
    found = summed([(ones, ones)], GRID, Grid(0.2, -8, 7))
    assert found.differing is None and found.max_error_steps is None
    assert summed([(ones, ones)], GRID, Grid(0.25 * (1 + 1e-6), -8, 7)).differing == 0  # as OpenVINO tells its ranges
    assert summed([(ones, ones)], None, None).differing is None


def test_tensors_of_different_shapes_are_refused():
    with pytest.raises(InputError, match=r"'x' has the shapes \[2\] and \[3\]"):
        summed([(np.zeros(2, np.float32), np.zeros(3, np.float32))])


def test_the_first_departure_of_integers_is_the_first_code_that_differs():
    found = parity(layer("a"), layer("b", 60.0, 1e-6), layer("c", 10.0, 0.5))
    assert found.first_departure.name == "b"
    assert parity(layer("a"), layer("b")).first_departure is None
    # Without codes there is only the noise.
    assert parity(layer("a", 30.0, None), layer("b", 19.0, None)).first_departure.name == "b"


def test_the_first_departure_from_a_float_model_is_the_first_noisy_tensor():
    layers = layer("a", 25.0, 0.3), layer("b", 19.9, 0.4), layer("c", 30.0, 0.2)
    assert parity(*layers, both_quantized=False).first_departure.name == "b"
    assert parity(*layers, both_quantized=False, threshold_db=10.0).first_departure is None
    assert parity(*layers, both_quantized=False, threshold_db=26.0).first_departure.name == "a"


def test_what_a_silu_reads_does_not_count_against_a_float_model():
    names = ("0.conv", "0.act.sigmoid", "0.act.mul", "1.act.sigmoid")
    layers = [layer(name, value) for name, value in zip(names, (5.0, 6.0, 25.0, 12.0), strict=True)]
    found = parity(*layers, both_quantized=False)
    assert found.first_departure.name == "1.act.sigmoid"  # a gate without a product is no SiLU's
    assert found.largest_drop == (layers[3], 13.0)


def test_the_largest_drop_is_that_between_neighbours():
    layers = layer("a", 50.0), layer("b", 45.0), layer("c", 30.0), layer("d", 28.0)
    assert parity(*layers).largest_drop == (layers[2], 15.0)
    assert parity(layer("a", 20.0), layer("b", 30.0)).largest_drop is None


def test_the_summary_weighs_layers_by_their_values():
    found = parity(layer("a", 40.0, 0.1, 300), layer("b", 30.0, 0.5, 100), layer("c", 35.0, None, 1000))
    assert found.summary() == {"images": 3, "min_sqnr_db": 30.0, "differing": pytest.approx(0.2)}
    assert "differing" not in parity(layer("a", 40.0, None)).summary()
