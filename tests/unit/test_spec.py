import pytest

from qyolo_deploy.errors import InputError
from qyolo_deploy.quant.spec import LayerScheme, QuantScheme, QuantSpec

LAYERS = [
    "model.0.conv",
    "model.1.conv",
    "model.2.cv1.conv",
    "model.2.cv2.conv",
    "model.22.cv2.0.2",
    "model.22.cv3.0.2",
]
ENDS = ["model.0.conv", "model.22.cv2.0.2", "model.22.cv3.0.2"]


def scheme(**others):
    return QuantScheme(QuantSpec(4), QuantSpec(8, signed=False), **others)


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "ends"),
    [
        (2, True, False, (-2, 1)),
        (3, True, False, (-4, 3)),
        (4, True, False, (-8, 7)),
        (8, True, False, (-128, 127)),
        (2, True, True, (-1, 1)),
        (4, True, True, (-7, 7)),
        (8, True, True, (-127, 127)),
        (2, False, False, (0, 3)),
        (4, False, False, (0, 15)),
        (8, False, False, (0, 255)),
    ],
)
def test_ends_of_the_grid(bits, signed, narrow, ends):
    spec = QuantSpec(bits, signed=signed, narrow_range=narrow)
    assert (spec.qmin, spec.qmax) == ends


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_a_grid_has_as_many_levels_as_its_bits_can_tell_apart(bits, signed):
    spec = QuantSpec(bits, signed=signed)
    assert spec.qmax - spec.qmin + 1 == 2**bits


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(InputError, match=f"bits is {bits}, expected 2 to 8"):
        QuantSpec(bits)


@pytest.mark.parametrize(("granularity", "axis"), [("per_tensor", 0), ("per_tensor", 1), ("per_channel", None)])
def test_axis_and_granularity_must_fit(granularity, axis):
    with pytest.raises(InputError, match=granularity):
        QuantSpec(8, granularity=granularity, axis=axis)


@pytest.mark.parametrize(
    "spec", [QuantSpec(4), QuantSpec(8, signed=False), QuantSpec(3, True, True, "per_channel", 0)], ids=str
)
def test_plain_data_and_back(spec):
    assert QuantSpec(**spec.to_json()) == spec


def test_label_names_weights_then_activations():
    assert scheme().label == "w4a8"


def test_ends_have_their_own_bits():
    found = scheme(first_last_bits=6).resolve(LAYERS, ENDS)
    assert list(found) == LAYERS
    assert {name for name, layer in found.items() if layer == LayerScheme(6, 6)} == set(ENDS)
    assert {name for name, layer in found.items() if layer == LayerScheme(4, 8)} == set(LAYERS) - set(ENDS)


def test_the_last_matching_override_wins_also_over_the_ends():
    overrides = {"model.2.*": LayerScheme(3, 8), "*.cv2.*": LayerScheme(2, 8)}
    found = scheme(overrides=overrides).resolve(LAYERS, ENDS)
    assert found["model.2.cv1.conv"].weight_bits == 3
    assert found["model.2.cv2.conv"].weight_bits == 2
    assert found["model.22.cv2.0.2"].weight_bits == 2
    turned = scheme(overrides=dict(reversed(overrides.items()))).resolve(LAYERS, ENDS)
    assert turned["model.2.cv2.conv"].weight_bits == 3


def test_keeping_in_float_wins_over_everything():
    overrides = {"*": LayerScheme(2, 8)}
    found = scheme(overrides=overrides, keep_float=["model.22.cv2.*", "model.1.conv"]).resolve(LAYERS, ENDS)
    kept = {name for name, layer in found.items() if layer == LayerScheme(None, None)}
    assert kept == {"model.1.conv", "model.22.cv2.0.2"}


def test_globs_tell_upper_from_lower_case():
    with pytest.raises(InputError, match="MODEL"):
        scheme(keep_float=["MODEL.*"]).resolve(LAYERS, ENDS)


@pytest.mark.parametrize("key", ["overrides", "keep_float"])
def test_a_glob_without_a_layer_is_refused_by_name(key):
    globs = {"overrides": {"model.9.*": LayerScheme(3, 8)}, "keep_float": ["model.9.*"]}[key]
    with pytest.raises(InputError, match=r"'model\.9\.\*' matches no layer") as caught:
        scheme(**{key: globs}).resolve(LAYERS, ENDS)
    assert "model.0.conv" in caught.value.hint
