import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from qyolo_deploy.errors import InputError
from qyolo_deploy.quant.model import FORMAT_VERSION, QuantizedLayer, QuantizedModel, quantize_bias
from qyolo_deploy.quant.qparams import QParams
from qyolo_deploy.quant.spec import QuantSpec

ACTIVATION = QuantSpec(8, signed=False)
ARCHITECTURE = {"family": "yolov5", "config": {"nc": 2, "backbone": [[-1, 1, "Conv", [8, 3]]]}, "names": ["a", "ü"]}


def weight_spec(bits):
    return QuantSpec(bits, granularity="per_channel", axis=0)


def make_layer(rng, shape, bits, source):
    spec = weight_spec(bits)
    return QuantizedLayer(
        weight=rng.integers(spec.qmin, spec.qmax + 1, shape).astype(np.int8),
        qparams=QParams.of(spec, rng.uniform(0.001, 0.1, shape[0])),
        bias=rng.integers(-(2**31) + 1, 2**31, shape[0]).astype(np.int32),
        input=source,
    )


def make_model(backwards=False):
    rng = np.random.default_rng(0)
    layers = {
        "model.0.conv": make_layer(rng, (4, 3, 3, 3), 8, "images"),
        "model.10.conv": make_layer(rng, (5, 4, 1, 1), 4, "model.0.conv"),
        "model.2.conv": make_layer(rng, (6, 1, 3, 3), 3, "model.0.conv"),
    }
    activations = {
        name: QParams.of(ACTIVATION, rng.uniform(0.01, 0.1), rng.integers(0, 256))
        for name in ("images", *layers, "model.3.cat")
    }
    floats = {
        "model.9.weight": rng.normal(size=(2, 3, 1, 1)).astype(np.float32).transpose(1, 0, 2, 3),
        "model.9.bias": rng.normal(size=2).astype(np.float32),
    }
    if backwards:
        layers, activations, floats = (dict(reversed(part.items())) for part in (layers, activations, floats))
    return QuantizedModel(ARCHITECTURE, layers, activations, floats, "w4a8", {"checkpoint": "ab", "data": "cd"})


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    make_model().save(path)
    return path


def rewrite(path, change):
    """Changes tensors and header of a saved model with nothing of this package."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["qyolo"])
    change(tensors, header)
    save_file(tensors, path, {"qyolo": json.dumps(header)})


def same_qparams(left, right):
    return (
        left.spec == right.spec
        and np.array_equal(left.scale, right.scale)
        and np.array_equal(left.zero_point, right.zero_point)
    )


def test_everything_comes_back(saved):
    before, after = make_model(), QuantizedModel.load(saved)
    assert after.architecture == before.architecture
    assert (after.scheme, dict(after.lineage)) == (before.scheme, dict(before.lineage))
    assert set(after.layers) == set(before.layers)
    for name, layer in before.layers.items():
        found = after.layers[name]
        assert found.input == layer.input
        assert found.weight.dtype == np.int8
        np.testing.assert_array_equal(found.weight, layer.weight)
        np.testing.assert_array_equal(found.bias, layer.bias)
        assert same_qparams(found.qparams, layer.qparams)
        np.testing.assert_array_equal(after.bias_scale(name), before.bias_scale(name))
    assert set(after.activations) == set(before.activations)
    assert all(same_qparams(after.activations[name], value) for name, value in before.activations.items())
    assert set(after.float_tensors) == set(before.float_tensors)
    for name, value in before.float_tensors.items():
        np.testing.assert_array_equal(after.float_tensors[name], value)


def test_bias_scale_is_input_scale_times_weight_scale():
    model = make_model()
    layer = model.layers["model.10.conv"]
    source = model.activations["model.0.conv"].scale
    expected = [np.float32(source * scale) for scale in layer.qparams.scale]
    assert model.bias_scale("model.10.conv").tolist() == expected
    assert model.bias_scale("model.10.conv").dtype == np.float32


def test_files_are_the_same_byte_for_byte(saved, tmp_path):
    for name, model in {
        "again": make_model(),
        "reloaded": QuantizedModel.load(saved),
        "backwards": make_model(True),
    }.items():
        model.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == saved.read_bytes(), name


def test_it_is_read_where_there_is_no_torch(saved, repository, tmp_path):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from qyolo_deploy.quant.model import QuantizedModel\n"
        "model = QuantizedModel.load(Path(sys.argv[1]))\n"
        "model.save(Path(sys.argv[2]))\n"
        "print(sum(layer.weight.size for layer in model.layers.values()))\n"
    )
    target = tmp_path / "copy.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", script, saved, target], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(layer.weight.size for layer in make_model().layers.values())
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(saved.read_bytes()).digest()


def remove(kind, name):
    return lambda tensors, header: (tensors if kind == "tensor" else header[kind]).pop(name)


def replace_tensor(name, value):
    return lambda tensors, header: tensors.update({name: value})


def set_header(key, value):
    return lambda tensors, header: header.update({key: value})


def set_weight_spec(**entries):
    return lambda tensors, header: header["layers"]["model.10.conv"]["weight"].update(entries)


BAD = {
    "missing weight": (remove("tensor", "weight/model.0.conv"), "weight/model.0.conv"),
    "missing scale": (remove("tensor", "scale/images"), "scale/images"),
    "missing bias": (remove("tensor", "bias/model.2.conv"), "bias/model.2.conv"),
    "unknown tensor": (replace_tensor("extra", np.zeros(1, np.float32)), "unknown tensor 'extra'"),
    "tensor of an unknown layer": (remove("layers", "model.2.conv"), "unknown tensor 'bias/model.2.conv'"),
    "unquantized input": (remove("activations", "images"), "reads 'images'"),
    "short bias": (replace_tensor("bias/model.0.conv", np.zeros(3, np.int32)), "4 output channels"),
    "long scales": (replace_tensor("weight_scale/model.0.conv", np.ones(5, np.float32)), "4 output channels"),
    "float weight": (replace_tensor("weight/model.0.conv", np.zeros((4, 3, 3, 3), np.float32)), "float32"),
    "flat weight": (replace_tensor("weight/model.0.conv", np.zeros((4, 27), np.int8)), "4 dimensions"),
    "weight beyond 4 bits": (replace_tensor("weight/model.10.conv", np.full((5, 4, 1, 1), 8, np.int8)), r"\[-8, 7\]"),
    "wide bias": (replace_tensor("bias/model.0.conv", np.zeros(4, np.int64)), "int64"),
    "zero scale": (replace_tensor("scale/images", np.zeros((), np.float32)), "finite and positive"),
    "array as scale": (replace_tensor("scale/images", np.ones(2, np.float32)), "per_tensor"),
    "zero point off the grid": (replace_tensor("zero_point/images", np.array(256, np.int32)), r"\[0, 255\]"),
    "newer format": (
        set_header("format_version", FORMAT_VERSION + 1),
        f"{FORMAT_VERSION + 1}, expected {FORMAT_VERSION}",
    ),
    "no format": (lambda tensors, header: header.pop("format_version"), "format_version"),
    "layers as a list": (set_header("layers", []), "not a quantized model"),
    "unknown key of a grid": (set_weight_spec(colour="blue"), "colour"),
    "bits as text": (set_weight_spec(bits="4"), "not a quantized model"),
    "bits beyond a byte": (set_weight_spec(bits=16), "bits is 16"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_contents_are_refused_with_their_name(saved, case):
    change, message = BAD[case]
    rewrite(saved, change)
    with pytest.raises(InputError, match=message) as caught:
        QuantizedModel.load(saved)
    assert str(caught.value).count(str(saved)) == 1


@pytest.mark.parametrize("length", [0, 4, 200, -1])
def test_a_cut_file_is_refused(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(InputError, match="not a quantized model"):
        QuantizedModel.load(saved)


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=r"model\.safetensors"):
        QuantizedModel.load(path)
    path.write_text("hello")
    with pytest.raises(InputError, match="not a quantized model"):
        QuantizedModel.load(path)
    save_file({"a": np.zeros(1, np.float32)}, path)
    with pytest.raises(InputError, match="not a quantized model"):
        QuantizedModel.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="not a quantized model"):
        QuantizedModel.load(path)


def test_biases_are_rounded_half_to_even_in_double_precision():
    scale = np.full(6, 2.0**-10, np.float32)
    bias = np.array([0.5, 1.5, -0.5, -2.5, 0.49999999, 1e6]) * 2.0**-10
    assert quantize_bias(bias, scale).tolist() == [0, 2, 0, -2, 0, 1000000]
    # In float32 this bias would be off by several steps.
    large = np.array([2**30 + 1], np.float64) * float(scale[0])
    assert quantize_bias(large, scale[:1]).tolist() == [2**30 + 1]


@pytest.mark.parametrize("steps", [2**31 - 1, -(2**31) + 1])
def test_the_largest_bias_fits(steps):
    assert quantize_bias(np.array([float(steps)]), np.ones(1, np.float32)).tolist() == [steps]


@pytest.mark.parametrize("bias", [2.0**31, -(2.0**31) - 1, np.inf, -np.inf, np.nan])
def test_a_bias_beyond_the_accumulator_is_refused(bias):
    with pytest.raises(InputError, match="int32 accumulator"):
        quantize_bias(np.array([0.0, bias]), np.ones(2, np.float32))
