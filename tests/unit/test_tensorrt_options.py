"""What a recipe's options become in TensorRT 10 and 11, of which a stand-in keeps all that it is told."""

from enum import IntEnum

import pytest

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.engines import tensorrt_build
from qyolo_deploy.engines.tensorrt_build import build_plan
from qyolo_deploy.engines.tensorrt_runtime import Device, TensorRt
from qyolo_deploy.engines.tensorrt_spec import BuildSpec, profile
from qyolo_deploy.errors import InputError, RuntimeMissingError
from qyolo_deploy.recipe import TensorRtSection, ValidateSection

ORIN = Device("Orin", "8.7", "CUDA 12.6")


class Named:
    """A layer, an input."""

    def __init__(self, name):
        self.name = name


class Network:
    layers = tuple(map(Named, ("model.0.conv", "model.0.act.mul", "model.1.cat")))

    def __init__(self, flags):
        self.flags, self.num_layers = flags, len(self.layers)

    def get_input(self, index):
        return Named("images")

    def get_layer(self, index):
        return self.layers[index]


class Cache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return self.content + b"+"


class Profile:
    def set_shape(self, *shapes):
        self.shapes = shapes


class Config:
    """Takes the attributes and calls of `IBuilderConfig`."""

    def __init__(self):
        self.flags, self.pools, self.profiles, self.devices, self.cache = set(), {}, [], {}, None
        self.refused = []

    def set_flag(self, flag):
        self.flags.add(flag.name)

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool] = size

    def add_optimization_profile(self, added):
        self.profiles.append(added.shapes)

    def set_device_type(self, layer, device):
        self.devices[layer.name] = device

    def create_timing_cache(self, content):
        return Cache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache.content == b"of another GPU":
            self.refused.append(cache.content)
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


def make_tensorrt(version, flags, levels=("NONE", "AMPERE_PLUS"), error=None):
    """A module and where its builder keeps network and configuration."""
    kept = {}

    class Module:
        class ILogger:
            ERROR, INTERNAL_ERROR, INFO = 1, 0, 3

            def __init__(self):
                pass

        class IProgressMonitor:
            def __init__(self):
                pass

        class OnnxParser:
            def __init__(self, network, log):
                pass

            def parse_from_file(self, path):
                return True

        class Builder:
            num_DLA_cores = 2

            def __init__(self, log):
                self.log = log

            def create_network(self, flags):
                return Network(flags)

            def create_builder_config(self):
                return Config()

            def create_optimization_profile(self):
                return Profile()

            def build_serialized_network(self, network, config):
                kept.update(network=network, config=config)
                if error is not None:
                    self.log.log(Module.ILogger.ERROR, error)
                    return None
                config.progress_monitor.phase_start("Building Engine", None, 2)
                config.progress_monitor.step_complete("Building Engine", 1)
                self.log.log(Module.ILogger.INFO, "Total Weights Memory: 1234 bytes")
                return b"plan"

        NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
        BuilderFlag = IntEnum("BuilderFlag", flags)
        HardwareCompatibilityLevel = IntEnum("HardwareCompatibilityLevel", levels)
        MemoryPoolType = IntEnum("MemoryPoolType", "WORKSPACE")
        DeviceType = IntEnum("DeviceType", "GPU DLA")

    return TensorRt(Module, "tensorrt", version), kept


TEN = "10.3.0", ("INT8", "FP16", "GPU_FALLBACK", "VERSION_COMPATIBLE")
ELEVEN = "11.0.0", ("GPU_FALLBACK", "VERSION_COMPATIBLE")  # in which the types of the graph are all that there is


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(tensorrt_build, "find_device", lambda: ORIN)


@pytest.fixture
def build(tmp_path):
    """Function from a TensorRT and options to what it builds."""
    onnx = tmp_path / "m.onnx"
    onnx.write_bytes(b"a graph")

    def run(runtime, tick=lambda *step: None, **options):
        section = TensorRtSection(**options)
        spec = BuildSpec(
            name="m",
            scheme="w8a8",
            onnx=onnx.name,
            onnx_sha256=sha256_file(onnx),
            input="images",
            shapes=profile(section, 640),
            imgsz=640,
            options=section,
            metadata={},
            validation=ValidateSection(),
        )
        return build_plan(runtime, tmp_path, spec, tick, kept=tmp_path / "kept")

    (tmp_path / "kept").mkdir()
    return run


@pytest.mark.parametrize(("tensorrt", "precision", "is_typed"), [(TEN, {"INT8", "FP16"}, False), (ELEVEN, set(), True)])
def test_options_reach_the_builder(build, tensorrt, precision, is_typed):
    runtime, kept = make_tensorrt(*tensorrt)
    steps = []
    built = build(
        runtime,
        lambda *step: steps.append(step),
        workspace_mib=256,
        optimization_level=5,
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        batch={"min": 1, "opt": 4, "max": 8},
    )
    config = kept["config"]
    assert kept["network"].flags == (1 << 1 if is_typed else 0)
    assert config.flags == precision | {"VERSION_COMPATIBLE"}
    assert config.pools == {runtime.module.MemoryPoolType.WORKSPACE: 256 * 2**20}
    assert config.builder_optimization_level == 5
    assert config.hardware_compatibility_level == runtime.module.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.profiles == [("images", (1, 3, 32, 32), (4, 3, 640, 640), (8, 3, 640, 640))]
    assert steps == [(0, 2, "Building Engine"), (2, 2, "Building Engine")]
    record = built.record
    assert (built.plan, record.weights_bytes, record.gpu, record.tensorrt) == (b"plan", 1234, "Orin", tensorrt[0])
    assert (record.driver, record.compute_capability) == ("CUDA 12.6", "8.7")
    assert (record.hardware_compatibility, record.version_compatible) == ("ampere_plus", True)


def test_without_half_precision_ten_is_not_asked_for_it(build):
    runtime, kept = make_tensorrt(*TEN)
    build(runtime, fp16=False)
    assert kept["config"].flags == {"INT8"}


def test_the_dla_takes_all_layers_but_those_that_the_recipe_leaves_to_the_gpu(build):
    runtime, kept = make_tensorrt(*TEN)
    build(runtime, dla_core=1, gpu_layers=("*.cat", "model.0.act*"))
    config, devices = kept["config"], runtime.module.DeviceType
    assert (config.default_device_type, config.DLA_core) == (devices.DLA, 1)
    assert "GPU_FALLBACK" in config.flags
    assert config.devices == {"model.0.act.mul": devices.GPU, "model.1.cat": devices.GPU}
    with pytest.raises(RuntimeMissingError, match="dla_core is 2, but this device has 2 DLA cores"):
        build(runtime, dla_core=2)


def test_timings_are_kept_for_the_next_build(build, tmp_path):
    runtime, kept = make_tensorrt(*TEN)
    file = tmp_path / "kept" / "timing.cache"
    build(runtime)
    assert file.read_bytes() == b"+"
    build(runtime)
    assert file.read_bytes() == b"++"
    file.write_bytes(b"of another GPU")
    build(runtime)
    assert kept["config"].refused and file.read_bytes() == b"+"
    file.unlink()
    build(runtime, timing_cache=False)
    assert not file.exists() and kept["config"].cache is None


def test_what_the_builder_refuses_names_the_node(build, tmp_path):
    error = "Error Code 10: Internal Error (Could not find any implementation for node model.0.conv + model.0.act.mul.)"
    runtime, _ = make_tensorrt(*TEN, error=error)
    with pytest.raises(InputError) as caught:
        build(runtime)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'm.onnx'}: TensorRT 10.3.0 cannot build it: node 'model.0.")
    assert "Could not find any implementation" in text and "Error Code" not in text


def test_what_a_version_or_a_machine_does_not_have_is_told(build, monkeypatch):
    runtime, _ = make_tensorrt(*TEN)
    with pytest.raises(RuntimeMissingError, match=r"TensorRT 10\.3\.0 has no hardware_compatibility: same_compute"):
        build(runtime, hardware_compatibility="same_compute_capability")
    monkeypatch.setattr(tensorrt_build, "find_device", lambda: None)
    with pytest.raises(RuntimeMissingError, match=r"TensorRT 10\.3\.0 builds on a GPU only, and none was found"):
        build(runtime)
