"""Fixtures that several files share: tiny detectors, the models made from them, and real data where there is some."""

import os
from pathlib import Path

import pytest

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
def make_scheme():
    """Function from bits of the weights and other arguments of `QuantScheme` to a scheme."""
    from qyolo_deploy.quant.spec import QuantScheme, QuantSpec

    def make(bits=4, **others):
        return QuantScheme(QuantSpec(bits), QuantSpec(8, signed=False), **others)

    return make


@pytest.fixture(scope="session")
def make_prepared(make_scheme, images):
    """Function from a detector and a scheme to a prepared and calibrated model."""
    from qyolo_deploy.graph.observers import calibrate
    from qyolo_deploy.graph.prepare import prepare

    def make(detector, scheme=None):
        model = prepare(detector, scheme or make_scheme())
        calibrate(model, [images])
        return model

    return make


@pytest.fixture(scope="session")
def quantized(pico, make_prepared):
    """`pico` as integers, W4A8 with ends of 8 bits."""
    from qyolo_deploy.graph.freeze import freeze

    return freeze(make_prepared(pico), {"checkpoint": "0" * 64})


@pytest.fixture(scope="session")
def float_model(pico):
    """`pico` as exported: open shapes, and the opset that has 4-bit integers."""
    from qyolo_deploy.export.float_onnx import export_float
    from qyolo_deploy.graph.simulate import fold_float

    return export_float(fold_float(pico), 64, dynamic=True, opset=21)


@pytest.fixture(scope="session")
def static_model(pico):
    """`pico` as exported for one image of 64 x 64 px."""
    from qyolo_deploy.export.float_onnx import export_float
    from qyolo_deploy.graph.simulate import fold_float

    return export_float(fold_float(pico), 64, dynamic=False)
