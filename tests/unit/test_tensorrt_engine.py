"""Specification, engine files and build of TensorRT engines; none of it needs a GPU but what is marked `gpu`."""

import json
import os
import re
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.engines.base import open_engine
from qyolo_deploy.engines.tensorrt_build import build_plan, named_node, shorten
from qyolo_deploy.engines.tensorrt_file import BuildRecord, check_record, differences, read_engine, write_engine
from qyolo_deploy.engines.tensorrt_runtime import (
    Device,
    call,
    find_device,
    import_tensorrt,
    is_strongly_typed,
    precision_flags,
)
from qyolo_deploy.engines.tensorrt_spec import BuildSpec, profile, read_spec, trtexec_lines
from qyolo_deploy.errors import InputError, IntegrityError, RuntimeMissingError
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.export.tensorrt import tensorrt_dialect
from qyolo_deploy.graph.simulate import simulate
from qyolo_deploy.recipe import TensorRtSection, ValidateSection

ORIN = Device("Orin", "8.7", "CUDA 12.6")
METADATA = {"stride": 32, "task": "detect", "batch": 1, "imgsz": [64, 64], "names": {0: "cat", 1: "dög"}}
RTX_VERSION = re.compile(r"TensorRT-RTX [\d.]+")


def record(**changes):
    values = {
        "flavor": "tensorrt",
        "tensorrt": "10.3.0",
        "gpu": "Orin",
        "compute_capability": "8.7",
        "driver": "CUDA 12.6",
        "onnx_sha256": "a" * 64,
        "weights_bytes": 1000,
        "hardware_compatibility": "none",
        "version_compatible": False,
    }
    return BuildRecord(**(values | changes))


def spec_of(onnx, shapes=None, **options):
    section = TensorRtSection(**options)
    return BuildSpec(
        name="m_w4a8",
        scheme="w4a8",
        onnx=onnx.name,
        onnx_sha256=sha256_file(onnx),
        input="images",
        shapes=shapes,
        imgsz=64,
        options=section,
        metadata=METADATA,
        validation=ValidateSection(),
    )


@pytest.fixture
def onnx_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no graph, but a file")
    return path


# --- version dispatch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavor", "version", "fp16", "flags"),
    [
        ("tensorrt", "10.3.0", True, ("INT8", "FP16")),
        ("tensorrt", "10.13.2.6", False, ("INT8",)),
        ("tensorrt", "11.0.0", True, ()),
        ("tensorrt_rtx", "1.7.1.116", True, ()),
    ],
)
def test_flags_of_ten_are_types_of_the_graph_in_eleven(flavor, version, fp16, flags):
    assert precision_flags(flavor, version, fp16) == flags
    assert is_strongly_typed(flavor, version) == (not flags)


def pretend_module(folder, text, monkeypatch):
    """A module `tensorrt` that is all that Python finds under that name."""
    (folder / "tensorrt.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__version__ = '8.6.1'", r"TensorRT 8\.6\.1 is too old, expected 10\.0"),
        ("import libnvinfer_of_nobody", "TensorRT is installed but does not load .*libnvinfer_of_nobody"),
        ("raise OSError('libnvinfer.so.10: cannot open')", r"does not load \(libnvinfer\.so\.10: cannot open\)"),
    ],
)
def test_a_tensorrt_that_is_of_no_use_is_told_from_none(tmp_path, monkeypatch, text, message):
    pretend_module(tmp_path, text, monkeypatch)
    with pytest.raises(RuntimeMissingError, match=message):
        import_tensorrt("tensorrt")
    sys.modules.pop("tensorrt", None)


def test_without_any_the_way_to_get_it_is_told(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeMissingError, match="TensorRT and TensorRT-RTX are not installed") as caught:
        import_tensorrt()
    assert caught.value.exit_code == 3


def test_calls_of_cuda_that_fail_are_named():
    class Status(int):
        name = "cudaErrorInsufficientDriver"

    def cudaGetDeviceCount():
        return Status(35), None

    with pytest.raises(RuntimeMissingError, match=r"cudaGetDeviceCount failed with cudaErrorInsufficientDriver \(35\)"):
        call(cudaGetDeviceCount)
    assert call(lambda *arguments: (Status(0), *arguments), 7) == 7
    assert call(lambda *arguments: (Status(0), *arguments), 7, 8) == (7, 8)


# --- files --------------------------------------------------------------------------------------------------


def test_an_engine_has_the_header_of_ultralytics_and_a_plan_has_none(tmp_path):
    plan = os.urandom(5000)
    engine, raw, beside = write_engine(tmp_path, "m", plan, METADATA, record())
    data = engine.read_bytes()
    length = int.from_bytes(data[:4], "little")  # as AutoBackend of ultralytics reads it
    header = json.loads(data[4 : 4 + length].decode("utf-8"))
    assert data[4 + length :] == raw.read_bytes() == plan
    assert {key: header[key] for key in METADATA if key != "names"} == {
        k: METADATA[k] for k in METADATA if k != "names"
    }
    assert header["names"] == {"0": "cat", "1": "dög"}
    assert json.loads(beside.read_text())["compute_capability"] == "8.7"
    metadata, found, read = read_engine(engine)
    assert (found, read) == (record(), plan)
    assert metadata["names"] == header["names"] and set(metadata) == set(METADATA)
    assert read_engine(raw) == ({}, record(), plan)


@pytest.mark.parametrize(
    "start", [b"ftrt\0\0\0\0", b"\x05\0\0\0abcde", b"\x02\0\0\0[]", b"\xff\xff\xff\xff", b"\x10\0\0\0{}"]
)
def test_what_is_no_header_belongs_to_the_plan(tmp_path, start):
    path = tmp_path / "foreign.engine"
    path.write_bytes(start + bytes(100))
    assert read_engine(path) == ({}, None, start + bytes(100))


def test_an_empty_engine_and_a_damaged_record_are_refused(tmp_path):
    path = tmp_path / "m.engine"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"m\.engine: empty"):
        read_engine(path)
    _, raw, beside = write_engine(tmp_path, "m", b"plan", METADATA, record())
    content = json.loads(beside.read_text())
    for broken in (content | {"flavor": "other"}, content | {"more": 1}, {"schema_version": 2}):
        beside.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=r"m\.plan\.json: the record of the build is not valid: '"):
            read_engine(raw)


# --- compatibility ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "version", "device", "told"),
    [
        ({}, "10.3.0", ORIN, []),
        ({"tensorrt": "10.3.0.26"}, "10.3.0", ORIN, []),
        ({}, "10.4.0", ORIN, ["built with TensorRT 10.3.0, but 10.4.0 is installed"]),
        ({"version_compatible": True}, "10.4.0", ORIN, []),
        ({"version_compatible": True}, "10.1.0", ORIN, ["built with TensorRT 10.3.0, but 10.1.0 is installed"]),
        ({"version_compatible": True}, "11.0.0", ORIN, ["built with TensorRT 10.3.0, but 11.0.0 is installed"]),
        (
            {},
            "10.3.0",
            Device("RTX 4090", "8.9", "CUDA 13.0"),
            ["built for Orin (compute capability 8.7), but this is RTX 4090 (8.9)"],
        ),
        ({"hardware_compatibility": "ampere_plus"}, "10.3.0", Device("RTX 4090", "8.9", ""), []),
        (
            {"hardware_compatibility": "ampere_plus"},
            "10.3.0",
            Device("T4", "7.5", ""),
            ["built for Orin (compute capability 8.7), but this is T4 (7.5)"],
        ),
        (
            {"flavor": "tensorrt_rtx", "tensorrt": "1.7.1.116", "gpu": None, "compute_capability": None},
            "1.7.1.116",
            Device("RTX 4090", "8.9", ""),
            [],
        ),
    ],
)
def test_a_record_tells_what_differs(changes, version, device, told):
    assert differences(record(**changes), version, device) == told


def test_all_that_differs_is_said_at_once_and_before_tensorrt_is_asked(tmp_path):
    with pytest.raises(
        RuntimeMissingError, match=r"m\.engine: built with .* is installed; built for .* but this is"
    ) as caught:
        check_record(tmp_path / "m.engine", record(), "10.4.0", Device("T4", "7.5", ""))
    assert "qyolo engine build" in caught.value.hint


# --- specification ------------------------------------------------------------------------------------------


def test_a_specification_is_found_by_file_folder_build_and_release(tmp_path, onnx_file):
    folder = tmp_path / "release" / "engines" / "tensorrt"
    folder.mkdir(parents=True)
    spec = spec_of(onnx_file.rename(folder / "m.onnx"), profile(TensorRtSection(), 64))
    (folder / "build.json").write_text(spec.to_text())
    for place in (folder / "build.json", folder, tmp_path / "release"):
        path, found = read_spec(place)
        assert (path, found.to_text()) == (folder / "build.json", spec.to_text())
    with pytest.raises(InputError, match=r"expected build\.json"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "'schema_version'"),
        ({"onnx": "../m.onnx"}, "'onnx': the path '../m.onnx' is not usable"),
        ({"options": {"workspace_mib": 0}}, "'options.workspace_mib'"),
        ({"unknown": 1}, "'unknown'"),
    ],
)
def test_a_specification_that_is_not_valid_names_the_key(tmp_path, onnx_file, change, message):
    content = json.loads(spec_of(onnx_file).to_text()) | change
    (tmp_path / "build.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_spec(tmp_path)
    assert str(tmp_path / "build.json") in str(caught.value)


def test_another_graph_than_specified_is_refused(tmp_path, onnx_file):
    (tmp_path / "build.json").write_text(spec_of(onnx_file).to_text())
    onnx_file.write_bytes(b"another graph")
    with pytest.raises(IntegrityError, match=r"m\.onnx: not the file"):
        read_spec(tmp_path)
    onnx_file.unlink()
    with pytest.raises(IntegrityError, match=r"m\.onnx: missing"):
        read_spec(tmp_path)


def test_the_command_lines_say_what_the_options_say(onnx_file):
    options = {
        "workspace_mib": 512,
        "optimization_level": 5,
        "batch": {"min": 1, "opt": 4, "max": 8},
        "hardware_compatibility": "ampere_plus",
        "version_compatible": True,
        "dla_core": 1,
        "gpu_layers": ("*cat*", "head"),
    }
    spec = spec_of(onnx_file, profile(TensorRtSection(**options), 64), **options)
    titles, (ten, eleven, rtx) = trtexec_lines(spec).splitlines()[::2], trtexec_lines(spec).splitlines()[1::2]
    assert titles[0] == "# TensorRT 10"
    words = ten.split()
    for word in (
        "--onnx=m.onnx",
        "--saveEngine=m_w4a8.plan",
        "--minShapes=images:1x3x32x32",
        "--optShapes=images:4x3x64x64",
        "--maxShapes=images:8x3x64x64",
        "--memPoolSize=workspace:512M",
        "--builderOptimizationLevel=5",
        "--timingCacheFile=timing.cache",
        "--hardwareCompatibilityLevel=ampere+",
        "--versionCompatible",
        "--useDLACore=1",
        "--allowGPUFallback",
        "--int8",
        "--fp16",
    ):
        assert word in words
    assert "'--layerDeviceTypes=*cat*:GPU,head:GPU'" in words
    assert eleven == ten.removesuffix(" --int8 --fp16")
    assert rtx.startswith("tensorrt_rtx --onnx") and "--useDLACore" not in rtx
    assert "Shapes" not in trtexec_lines(spec_of(onnx_file))


# --- messages -----------------------------------------------------------------------------------------------


def test_messages_lose_their_places_in_tensorrts_source():
    message = (
        "Invalid Node - q1\n"
        "ITensor::getDimensions: Error Code 4: API Usage Error (q1: input has type Int32. In checkType at "
        "/_src/optimizer/common/nodeBase.cpp:456)\n"
        "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35: no driver)"
    )
    assert shorten(message) == "q1: input has type Int32"
    assert shorten("Assertion failed: it is so") == "Assertion failed: it is so"


def test_the_node_that_a_message_is_about_is_the_longest_name_in_it():
    names = ["conv", "conv_1", "conv_12", "model.0.conv"]
    assert named_node("no kernel for node conv_1.", names) == "conv_1"
    assert named_node("node model.0.conv + act failed", names) == "model.0.conv"
    assert named_node("nothing is named", names) is None


# --- TensorRT-RTX, whose builder needs no GPU ---------------------------------------------------------------


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    return import_tensorrt("tensorrt_rtx")


@pytest.fixture(scope="module")
def dialect_file(tmp_path_factory, float_model, quantized):
    path = tmp_path_factory.mktemp("dialect") / "m.onnx"
    ir.save(tensorrt_dialect(float_model, quantized, fp16=True).model, path)
    return path


@pytest.fixture(scope="module")
def built(rtx, dialect_file):
    """What TensorRT-RTX makes of `pico`, with open shapes, and the progress that it told."""
    steps = []
    shapes = profile(TensorRtSection(), 128)
    plan = build_plan(rtx, dialect_file.parent, spec_of(dialect_file, shapes), lambda *step: steps.append(step))
    return plan, steps


def test_rtx_builds_the_dialect_with_weights_in_integers(built, quantized, rtx):
    plan, steps = built
    integers = sum(layer.weight.size for layer in quantized.layers.values())
    # Biases, scales and the float first layer come on top; float weights alone would be four times as much.
    assert integers < plan.record.weights_bytes < 2 * integers
    assert plan.record.flavor == "tensorrt_rtx" and plan.record.tensorrt == rtx.version
    assert len(plan.plan) > plan.record.weights_bytes
    done = [step[0] / step[1] for step in steps]
    assert all(0 <= share <= 1 for share in done) and done[-1] == 1


def test_a_refused_graph_gets_one_sentence_with_the_node(rtx, float_model, quantized, tmp_path):
    path = tmp_path / "m.onnx"
    ir.save(insert_qdq(float_model, quantized), path)
    with pytest.raises(InputError) as caught:
        build_plan(rtx, tmp_path, spec_of(path, profile(TensorRtSection(), 64)), lambda *step: None)
    text = str(caught.value)
    assert text.startswith(str(path)) and RTX_VERSION.search(text)
    assert "refuses the node '" in text and "bias_dequantized' (DequantizeLinear): " in text
    assert "Int32" in text and "_src" not in text and "\n" not in text and "Error Code" not in text


def test_what_is_no_graph_is_refused(rtx, onnx_file):
    with pytest.raises(InputError, match=r"TensorRT-RTX [\d.]+ refuses it: .*Failed to parse the ONNX model"):
        build_plan(rtx, onnx_file.parent, spec_of(onnx_file), lambda *step: None)


def test_without_a_gpu_an_engine_is_not_opened(built, tmp_path):
    if find_device() is not None:
        pytest.skip("there is a GPU")
    engine, plan, _ = write_engine(tmp_path, "m", built[0].plan, METADATA, built[0].record)
    for path in (engine, plan):
        with pytest.raises(RuntimeMissingError, match=r"TensorRT-RTX [\d.]+ runs on a GPU only, and none was found"):
            open_engine(path)


@pytest.fixture(scope="session")
def gpu():
    if find_device() is None:
        pytest.skip("no GPU, so that running TensorRT engines is not verified here")


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_an_engine_on_the_gpu_agrees_with_the_view(gpu, built, tmp_path, pico, quantized, images):
    engine, plan, _ = write_engine(tmp_path, "m", built[0].plan, METADATA, built[0].record)
    runner = open_engine(engine)
    assert (runner.names, runner.trained_imgsz, runner.imgsz) == (("cat", "dög"), 64, None)
    with torch.no_grad():
        expected = simulate(pico, quantized)(images[:1]).numpy()
    output = runner(images[:1].numpy())
    assert np.abs(output[:, 4:] - expected[:, 4:]).mean() < 0.02
    kept = output.copy()
    runner(np.zeros((1, 3, 64, 64), np.float32))
    np.testing.assert_array_equal(output, kept)
    np.testing.assert_array_equal(open_engine(plan)(images[:1].numpy()), kept)
    with pytest.raises(InputError, match="cannot run on images of shape"):
        runner(np.zeros((1, 3, 256, 256), np.float32))


@pytest.mark.gpu
def test_a_fixed_engine_gives_the_same_as_a_cuda_graph(gpu, rtx, static_model, quantized, tmp_path):
    path = tmp_path / "m.onnx"
    ir.save(tensorrt_dialect(static_model, quantized).model, path)
    built = build_plan(rtx, tmp_path, spec_of(path), lambda *step: None)
    runner = open_engine(write_engine(tmp_path, "m", built.plan, METADATA, built.record)[0])
    image = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    first, captured, replayed = (runner(image) for _ in range(3))
    np.testing.assert_array_equal(first, captured)
    np.testing.assert_array_equal(first, replayed)
    assert not np.array_equal(runner(1 - image), first)
