"""Fixtures that several files share: tiny detectors, the models made from them, and real data where there is some."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

import qyolo_deploy

# Before anyone imports torch: on tensors this small, a second thread costs more than it brings, and fifteen times as
# much where another process has the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

pytest.register_assert_rewrite("helpers")  # so that their assertions explain themselves too

REPOSITORY = Path(__file__).parent.parent
PICO = REPOSITORY / "recipes" / "architectures" / "yolov8-pico.yaml"

TINY_YOLOV5 = """
nc: 3
depth_multiple: 0.33
width_multiple: 0.125
anchors: [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]]
backbone:
  - [-1, 1, Conv, [64, 6, 2, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 3, C3, [128]]
  - [-1, 1, Conv, [256, 3, 2]]
  - [-1, 1, SPPF, [256, 5]]
head:
  - [-1, 1, Conv, [128, 1, 1]]
  - [-1, 1, nn.Upsample, [null, 2, nearest]]
  - [[-1, 3], 1, Concat, [1]]
  - [-1, 3, C3, [128, false]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [[-1, 6], 1, Concat, [1]]
  - [-1, 3, C3, [256, false]]
  - [[9, 12], 1, Detect, [nc, anchors]]
"""


@pytest.fixture(scope="session")
def repository():
    return REPOSITORY


@pytest.fixture(scope="session")
def data_root():
    """Folder of real data, named by QYOLO_DATA."""
    root = os.environ.get("QYOLO_DATA")
    if not root:
        pytest.skip("QYOLO_DATA is not set")
    return Path(root)


@pytest.fixture(scope="session")
def yolov5n_checkpoint(data_root):
    path = data_root / "weights" / "yolov5n.pt"
    if not path.is_file():
        pytest.skip("QYOLO_DATA has no weights/yolov5n.pt")
    return path


def randomise(detector, seed):
    """Weights of a network that was never trained, but with everything that makes folding hard.

    The running statistics are those of a batch, so that no activation vanishes in the depth of the network; a third of
    the gammas is negative, and the convolutions of the heads have biases.
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in detector.core.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            channels, norm.momentum = norm.num_features, 1.0
            sign = torch.where(torch.rand(channels, generator=generator) < 0.3, -1.0, 1.0)
            norm.weight.copy_((torch.rand(channels, generator=generator) + 0.5) * sign)
            norm.bias.copy_(torch.randn(channels, generator=generator) * 0.3)
        detector.core.train()(torch.rand(4, 3, 64, 64, generator=generator))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module in detector.core.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    return detector.eval()


@pytest.fixture(scope="session")
def make_detector(tmp_path_factory):
    """Function from `pico`, `yolov5`, or the name of an ultralytics architecture to a detector with random weights."""
    from qyolo_deploy.models.registry import load_detector

    tiny = tmp_path_factory.mktemp("architectures") / "tiny.yaml"
    tiny.write_text(TINY_YOLOV5, encoding="utf-8")
    files = {"pico": str(PICO), "yolov5": str(tiny)}

    def make(kind="pico", seed=0):
        return randomise(load_detector(None, files.get(kind, kind), None, seed), seed)

    return make


@pytest.fixture(scope="session")
def small_network():
    """Function to a network with one of everything: stem, split, residual, pool, resize, concat, two heads."""
    import torch
    from torch import nn

    def block(c_in, c_out, size=3):
        conv = nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.SiLU())

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.c = block(3, 8), block(4, 4), block(20, 8, 1), block(8, 8)
            self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
            self.head_1, self.head_2 = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 6, 1)

        def forward(self, x):
            stem = self.stem(x)
            left, right = stem.chunk(2, 1)
            right = right + self.a(right)
            small = self.up(self.pool(stem))
            joined = self.b(torch.cat([left, right, small, self.c(stem)[:, :4]], 1))
            return self.head_1(joined), self.head_2(joined)

    def make():
        torch.manual_seed(0)
        return SimpleNamespace(core=Network().eval(), spec=SimpleNamespace(to_json=dict))

    return make


@pytest.fixture(scope="session")
def pico(make_detector):
    """A detector to look at; who changes it makes one of their own."""
    return make_detector()


@pytest.fixture(scope="session")
def images():
    """float32 `[2, 3, 64, 96]`: smooth and noisy, as no test should depend on a single kind of image."""
    import torch

    generator = torch.Generator().manual_seed(7)
    small = torch.rand(1, 3, 4, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(small, (64, 96), mode="bilinear")
    return torch.cat([smooth, torch.rand(1, 3, 64, 96, generator=generator)])


@pytest.fixture(scope="session")
def train_scenes(tmp_path_factory):
    """Twelve scenes of the size that the tests train on."""
    from helpers.training import IMGSZ

    from qyolo_deploy.data.dataset import load_dataset
    from qyolo_deploy.data.synthetic import generate

    root = tmp_path_factory.mktemp("scenes") / "data"
    return load_dataset(generate(root, seed=0, train_images=12, val_images=1, imgsz=IMGSZ), "train")


@pytest.fixture(scope="session")
def make_scheme():
    """Function from bits of weights and activations and other arguments of `QuantScheme` to a scheme.

    As recipes do unless told otherwise, it keeps to weights that all processors add up without saturating.
    """
    from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

    def make(bits=4, activations=8, **others):
        grids = QuantSpec(bits), QuantSpec(activations, signed=False)
        return QuantScheme(*grids, **{"reduce_range": True} | others)

    return make


def set_ranges(model, images):
    """Scales and offsets from extremes, in a fraction of the time that calibration takes to search better ones."""
    import torch

    extremes = dict.fromkeys(model.quantizers(), (0.0, 0.0))

    def watch(group):
        def look(_, inputs):
            low, high = extremes[group]
            extremes[group] = min(low, inputs[0].min().item()), max(high, inputs[0].max().item())

        return look

    handles = [quantizer.register_forward_pre_hook(watch(name)) for name, quantizer in model.quantizers().items()]
    model.set_activations(False)
    model.set_weights(False)
    with torch.no_grad():
        model(images)
        for group, quantizer in model.quantizers().items():
            low, high = extremes[group]
            quantizer.scale.fill_((high - low) / quantizer.spec.qmax)
            quantizer.offset.fill_(low)
        for conv in model.convs().values():
            if conv.quantizer is not None:
                size = conv.weight.abs().flatten(1).amax(1)
                size = size if conv.quantizer.scale.ndim else size.max()
                conv.quantizer.scale.copy_(size / conv.quantizer.spec.qmax)
    for handle in handles:
        handle.remove()
    model.set_activations(True)
    model.set_weights(True)


@pytest.fixture(scope="session")
def make_prepared(make_scheme, images):
    """Function from a detector, a scheme and images to a prepared model with ranges that fit those."""
    from qyolo_deploy.graph.prepare import prepare

    def make(detector, scheme=None, images=images):
        model = prepare(detector, scheme or make_scheme()).eval()
        set_ranges(model, images)
        return model

    return make


@pytest.fixture(scope="session")
def quantized(pico, make_prepared):
    """`pico` as integers, W4A8 with ends of 8 bits."""
    from qyolo_deploy.graph.freeze import freeze

    return freeze(make_prepared(pico), {"checkpoint": "0" * 64})


@pytest.fixture(scope="session")
def float_model(pico):
    """`pico` as exported: open shapes."""
    from qyolo_deploy.export.float_onnx import export_float
    from qyolo_deploy.graph.simulate import fold_float

    return export_float(fold_float(pico), 64, dynamic=True)


@pytest.fixture(scope="session")
def static_model(pico):
    """`pico` as exported for one image of 64 x 64 px."""
    from qyolo_deploy.export.float_onnx import export_float
    from qyolo_deploy.graph.simulate import fold_float

    return export_float(fold_float(pico), 64, dynamic=False)


# --- the command line, and a small build that it has finished -----------------------------------------------

TINY = {
    "data.synthetic.train_images": 24,
    "data.synthetic.val_images": 12,
    "data.calibration_images": 8,
    "quantization.activations.bits": 8,
    "model.imgsz": 128,
    "train.epochs": 3,
    "train.batch": 8,
    "correct.images": 16,
    "correct.batch": 8,
    "validate.latency_runs": 3,
    "gates": '[{view: onnxruntime, metric: map50_95, op: ">=", bound: -0.001, relative_to: fake_quantized}]',
}


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self):
        """The last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])


class Command:
    """`qyolo` in a process of its own, as a shell would start it; no data but what its arguments name."""

    line = (sys.executable, "-c", "import sys; from qyolo_deploy.cli import main; sys.argv[0] = 'qyolo'; main()")

    def environment(self, **changes):
        kept = {key: value for key, value in os.environ.items() if key not in ("QYOLO_DATA", "FORCE_COLOR", "COLUMNS")}
        package = Path(qyolo_deploy.__file__).parent.parent  # the same that the tests themselves import
        path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
        return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}

    def start(self, *arguments, cwd=None, **environment):
        return subprocess.Popen(
            [*self.line, *map(str, arguments)],
            cwd=cwd,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments, cwd=None, **environment):
        process = self.start(*arguments, cwd=cwd, **environment)
        try:
            stdout, stderr = process.communicate(timeout=900)
        finally:
            process.kill()
        return Outcome(process.returncode, stdout, stderr)


@dataclass(frozen=True)
class TinyBuild:
    """The quickstart on a few images: where it lies, what `qyolo build` was told, and what came of it."""

    out: Path
    settings: tuple[str, ...]
    outcome: Outcome | None = None

    recipe = REPOSITORY / "recipes" / "quickstart.yaml"

    @property
    def folder(self):
        return self.out / "quickstart"

    @property
    def onnx(self):
        return self.folder / "engines" / "onnxruntime" / "quickstart_w4a8.onnx"

    @property
    def openvino(self):
        return self.folder / "engines" / "openvino" / "quickstart_w4a8_openvino_model"

    @property
    def report(self):
        return json.loads((self.folder / "report.json").read_text(encoding="utf-8"))

    def arguments(self, *settings):
        """The build's, with further settings and another place for what it makes."""
        return ("build", self.recipe, *(word for setting in (*self.settings, *settings) for word in ("--set", setting)))


@pytest.fixture(scope="session")
def qyolo():
    return Command()


@pytest.fixture(scope="session")
def tiny_settings():
    """Settings that make a build of the quickstart take seconds."""
    return tuple(f"{key}={value}" for key, value in TINY.items())


@pytest.fixture(scope="session")
def tiny_build(qyolo, tiny_settings, tmp_path_factory):
    """A finished build; who changes its files takes `tiny_copy`."""
    build = TinyBuild(tmp_path_factory.mktemp("tiny"), tiny_settings)
    outcome = qyolo(*build.arguments(), "--out", build.out, "--json")
    assert outcome.code == 0, outcome.stderr
    return replace(build, outcome=outcome)


@pytest.fixture
def tiny_copy(tiny_build, tmp_path):
    return replace(tiny_build, out=Path(shutil.copytree(tiny_build.out, tmp_path / "copy")))


@pytest.fixture(scope="session")
def photographs(data_root):
    """float32 `[3, 3, 160, 160]`, from COCO."""
    import numpy as np
    import torch

    from qyolo_deploy.data.images import list_images, read_image
    from qyolo_deploy.data.letterbox import letterbox, to_tensor

    files = list_images(data_root / "coco-subset" / "images")[:3]
    if len(files) < 3:
        pytest.skip("QYOLO_DATA has no coco-subset/images")
    return torch.from_numpy(np.concatenate([to_tensor(letterbox(read_image(f), 160, rect=False)[0]) for f in files]))


@pytest.fixture(scope="session")
def official(yolov5n_checkpoint, photographs, make_prepared, make_scheme):
    """The official yolov5n: detector, integers W8A8, float graph for 160 px."""
    from qyolo_deploy.export.float_onnx import export_float
    from qyolo_deploy.graph.freeze import freeze
    from qyolo_deploy.graph.simulate import fold_float
    from qyolo_deploy.models.registry import load_detector

    detector = load_detector(yolov5n_checkpoint, None, None, 0).eval()
    quantized = freeze(make_prepared(detector, make_scheme(8), photographs), {})
    return detector, quantized, export_float(fold_float(detector), 160, dynamic=False)
