import copy
import math
import os
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import ModelSpec
from qyolo_deploy.models.checkpoint import read_checkpoint
from qyolo_deploy.models.decode import AnchorDecode
from qyolo_deploy.models.registry import build_detector, load_detector
from qyolo_deploy.models.yolov5 import spec_from_yolov5_config
from qyolo_deploy.models.yolov5_blocks import SPPF

ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]


def config(width: float = 0.25, **changes):
    """The published layout of YOLOv5 6.0: rows of [from, repeats, layer, arguments]."""
    backbone = [[-1, 1, "Conv", [64, 6, 2, 2]]]
    for channels, repeats in ((128, 3), (256, 6), (512, 9), (1024, 3)):
        backbone += [[-1, 1, "Conv", [channels, 3, 2]], [-1, repeats, "C3", [channels]]]
    backbone += [[-1, 1, "SPPF", [1024, 5]]]
    head = []
    for channels, lateral in ((512, 6), (256, 4)):
        head += [[-1, 1, "Conv", [channels, 1, 1]], [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]]
        head += [[[-1, lateral], 1, "Concat", [1]], [-1, 3, "C3", [channels, False]]]
    for channels, lateral in ((256, 14), (512, 10)):
        head += [[-1, 1, "Conv", [channels, 3, 2]], [[-1, lateral], 1, "Concat", [1]]]
        head += [[-1, 3, "C3", [2 * channels, False]]]
    head += [[[17, 20, 23], 1, "Detect", ["nc", "anchors"]]]
    rows = {"backbone": backbone, "head": head, "anchors": ANCHORS}
    return {"nc": 80, "depth_multiple": 0.33, "width_multiple": width, **rows, **changes}


def detector(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return build_detector(spec_from_yolov5_config(config(**changes))).eval()


def official_decode(raw: np.ndarray, stride: int, anchors: np.ndarray, classes: int) -> np.ndarray:
    """YOLOv5's formulas written as loops: `[4 + nc, anchors * h * w]` for one level of one image."""
    _, height, width = raw.shape
    columns = []
    for a, (w_a, h_a) in enumerate(anchors):
        for y in range(height):
            for x in range(width):
                cell = raw[a * (5 + classes) : (a + 1) * (5 + classes), y, x].astype(np.float64)
                s = 1 / (1 + np.exp(-cell))
                box = [(2 * s[0] - 0.5 + x) * stride, (2 * s[1] - 0.5 + y) * stride]
                box += [(2 * s[2]) ** 2 * w_a, (2 * s[3]) ** 2 * h_a]
                columns.append([*box, *(s[4] * s[5:])])
    return np.array(columns).T


def test_yolov5n_has_the_published_size_names_and_strides():
    model = detector()
    state = model.core.state_dict()
    assert sum(p.numel() for p in model.core.parameters()) == 1_872_157
    assert model.spec.strides == (8, 16, 32)
    assert state["model.0.conv.weight"].shape == (16, 3, 6, 6)
    assert state["model.24.m.2.weight"].shape == (255, 256, 1, 1)
    assert "model.4.m.1.cv2.bn.running_var" in state and "model.4.m.2.cv2.conv.weight" not in state
    bn = model.core.get_submodule("model.9.cv1.bn")
    assert (bn.eps, bn.momentum) == (1e-3, 0.03)


def test_decode_agrees_with_the_formulas_in_the_official_order():
    rng = np.random.default_rng(1)
    classes, strides = 3, (8, 16)
    anchors = [[10.0, 13.0, 16.0, 30.0], [30.0, 61.0, 62.0, 45.0]]
    maps = [rng.normal(0, 3, (2, 2 * (5 + classes), *size)).astype(np.float32) for size in ((4, 6), (2, 3))]
    got = AnchorDecode(anchors, strides)(tuple(torch.from_numpy(m) for m in maps)).numpy()
    for image in range(2):
        expected = np.concatenate(
            [
                official_decode(m[image], stride, np.reshape(a, (-1, 2)), classes)
                for m, stride, a in zip(maps, strides, anchors, strict=True)
            ],
            axis=1,
        )
        np.testing.assert_allclose(got[image], expected, rtol=1e-5, atol=1e-5)


def test_pooling_in_a_row_is_pooling_at_5_9_and_13():
    torch.manual_seed(0)
    block, x = SPPF(16, 8).eval(), torch.randn(1, 16, 20, 20)
    once = block.cv1(x)
    pools = [nn.functional.max_pool2d(once, k, 1, k // 2) for k in (5, 9, 13)]
    torch.testing.assert_close(block(x), block.cv2(torch.cat((once, *pools), 1)), rtol=0, atol=0)


def test_core_is_traced_with_only_torch_modules_as_leaves():
    model = detector()

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)

    graph = torch.fx.GraphModule(model.core, Tracer().trace(model.core))
    x = torch.rand(1, 3, 64, 96)
    for traced, direct in zip(graph(x), model.core(x), strict=True):
        assert torch.equal(traced, direct)


def test_fresh_head_expects_about_eight_objects_an_image():
    model = detector(nc=3)
    for conv, stride in zip(model.core.model[-1].m, model.spec.strides, strict=True):
        objectness = conv.bias.detach().view(3, 8)[:, 4].sigmoid().mean()
        assert 4 < float(objectness) * (640 / stride) ** 2 < 16


def test_builds_are_reproducible_by_seed(tmp_path):
    path = tmp_path / "v5.yaml"
    path.write_text(str(config(nc=2)))  # a Python literal of this kind is valid YAML
    first, again, other = (load_detector(None, str(path), ["a", "b"], seed) for seed in (1, 1, 2))
    weight = "model.24.m.0.weight"
    assert torch.equal(first.core.state_dict()[weight], again.core.state_dict()[weight])
    assert not torch.equal(first.core.state_dict()[weight], other.core.state_dict()[weight])


def test_label_loss_trains_every_layer():
    model = detector(nc=2)
    batch = {
        "img": torch.rand(2, 3, 64, 96),
        "cls": torch.tensor([[1.0], [0.0]]),
        "bboxes": torch.tensor([[0.5, 0.4, 0.3, 0.5], [0.2, 0.7, 0.9, 0.6]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    total, parts = model.loss(model.core(batch["img"]), batch)
    assert total.item() == pytest.approx(2 * sum(parts.values())) and min(parts.values()) > 0
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.core.parameters())


def test_named_activation_replaces_silu():
    model = detector(activation="nn.LeakyReLU(0.1)")
    acts = {type(m) for m in model.core.modules() if isinstance(m, nn.SiLU | nn.LeakyReLU)}
    assert acts == {nn.LeakyReLU}
    assert model.core.get_submodule("model.0.act").negative_slope == 0.1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nc": 0}, "key 'nc'"),
        ({"depth_multiple": None}, "key 'depth_multiple'"),
        ({"ch": 1}, "three channels"),
        ({"anchors": [[10, 13], [1, 2, 3, 4]]}, "width, height pairs"),
        ({"anchors": [[10, -13]] * 3}, "positive"),
        ({"anchors": [[10, 13]] * 2}, "3 head levels"),
        ({"backbone": [[-1, 1, "Focus", [64, 3]]]}, "layer 'Focus'"),
        ({"backbone": [[-1, 1, "Conv", []]]}, r"Layer 0 .*arguments \[\]"),
        ({"backbone": [[-1, 1, "Conv", ["sixty", 3]]]}, r"Layer 0 .*do not fit"),
        ({"backbone": [[5, 1, "Conv", [64, 3]]]}, "Layer 0 .*not"),
        ({"backbone": ["Conv"]}, "Layer 0 .*not"),
        ({"head": [[-1, 1, "Conv", [64, 3]]]}, "must be Detect"),
        ({"activation": "nn.SiLU(__import__('os').getpid())"}, "activation"),
        ({"activation": "nn.Sequential()"}, "activation"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        build_detector(spec_from_yolov5_config(config(**changes)))


def test_class_names_must_match_the_config():
    with pytest.raises(InputError, match="nc=80 but 1 class names"):
        build_detector(ModelSpec("yolov5", config(), ("cell",), (8, 16, 32)))


def as_official(module: nn.Module, homes: dict[str, types.ModuleType]) -> nn.Module:
    """Give a module tree the class names under which YOLOv5 pickles its own."""
    name = {"DetectConvs": "Detect", "Yolov5Core": "DetectionModel"}.get(type(module).__name__, type(module).__name__)
    if type(module).__module__.startswith("torch."):
        twin = module
    else:
        home = homes["models.yolo" if name in ("Detect", "DetectionModel") else "models.common"]
        kind = home.__dict__.setdefault(name, type(name, (nn.Module,), {"__module__": home.__name__}))
        twin = kind.__new__(kind)
        twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = {k: as_official(m, homes) for k, m in module._modules.items()}
    return twin


def save_official(path: Path, model, monkeypatch, **attributes) -> None:
    """Save a detector as YOLOv5 saves its training checkpoints: half precision, EMA, classes of `models`."""
    homes = {name: types.ModuleType(name) for name in ("models", "models.common", "models.yolo")}
    official = as_official(copy.deepcopy(model.core), homes).half()
    cells = torch.tensor(model.spec.config["anchors"]).reshape(3, 3, 2)
    official.model[-1].register_buffer("anchors", (cells / torch.tensor([[[8.0]], [[16.0]], [[32.0]]])).half())
    official.yaml, official.yaml_file = model.spec.config, "/home/someone/yolov5n.yaml"
    official.names, official.stride = list(model.spec.names), torch.tensor([8.0, 16.0, 32.0])
    for name, value in attributes.items():
        setattr(official, name, value)
    with monkeypatch.context() as patch:
        for name, home in homes.items():
            patch.setitem(sys.modules, name, home)
        extras = {"best_fitness": np.array([0.3]), "opt": {"cfg": Path("x")}, "date": "2022-02-08"}
        torch.save({"epoch": 2, "model": None, "ema": official, "updates": 5, **extras}, path)


def test_official_layout_is_read_without_its_classes(tmp_path, monkeypatch):
    model = detector(seed=3)
    published = model.spec.config["anchors"]
    tuned = [[8.0 * i for i in range(1, 7)], [24.0] * 6, [80.0] * 6]  # as autoanchor may have left them
    model.spec.config["anchors"] = tuned
    save_official(tmp_path / "v5.pt", model, monkeypatch)
    model.spec.config["anchors"] = published
    checkpoint = read_checkpoint(tmp_path / "v5.pt")
    assert not any(name.split(".")[0] == "models" for name in sys.modules)
    assert checkpoint.spec.names == model.spec.names and checkpoint.spec.strides == (8, 16, 32)
    assert checkpoint.spec.config["anchors"] == tuned
    assert "yaml_file" not in checkpoint.spec.config
    assert set(checkpoint.state) == set(model.core.state_dict())
    again = load_detector(tmp_path / "v5.pt", None, None, 0).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x)[:, 4:], model(x)[:, 4:], rtol=2e-2, atol=1e-5)


def test_activation_of_the_pickled_modules_wins_over_a_silent_yaml(tmp_path, monkeypatch):
    model = detector(activation="nn.Hardswish()")
    del model.spec.config["activation"]
    save_official(tmp_path / "v5.pt", model, monkeypatch)
    assert read_checkpoint(tmp_path / "v5.pt").spec.config["activation"] == "nn.Hardswish()"


def test_yolov7_is_recognised_and_refused(tmp_path, monkeypatch):
    home = types.ModuleType("models.common")
    home.SPPCSPC = type("SPPCSPC", (nn.Module,), {"__module__": "models.common"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "models", types.ModuleType("models"))
        patch.setitem(sys.modules, "models.common", home)
        torch.save({"model": home.SPPCSPC()}, tmp_path / "v7.pt")
    with pytest.raises(InputError, match="YOLOv7"):
        read_checkpoint(tmp_path / "v7.pt")
    with pytest.raises(InputError, match="YOLOv7"):
        load_detector(None, "yolov7-tiny", None, 0)


@pytest.mark.skipif("QYOLO_DATA" not in os.environ, reason="QYOLO_DATA with the official yolov5n.pt is not set")
def test_official_weights_find_what_is_annotated():
    root = Path(os.environ["QYOLO_DATA"])
    model = load_detector(root / "weights" / "yolov5n.pt", None, None, 0).eval()
    assert model.spec.names[:2] == ("person", "bicycle") and len(model.spec.names) == 80
    found = total = 0
    for label in sorted((root / "coco-subset" / "labels" / "val2017").glob("*.txt"))[:12]:
        image = cv2.imread(str(root / "coco-subset" / "images" / "val2017" / f"{label.stem}.jpg"))
        height, width = image.shape[:2]
        padded = np.full((640, 640, 3), 114, np.uint8)
        padded[:height, :width] = image[:640, :640]
        x = torch.from_numpy(padded[:, :, ::-1].transpose(2, 0, 1).copy())[None].float() / 255
        with torch.no_grad():
            output = model(x)[0].numpy()
        for cls, *xywh in np.loadtxt(label, ndmin=2):
            box = np.array(xywh) * [width, height, width, height]
            if box[2] * box[3] < 96**2:
                continue
            total += 1
            near = np.abs(output[:4].T - box).max(1) < 0.2 * math.sqrt(box[2] * box[3])
            found += bool((output[4 + int(cls), near] > 0.05).any())
    assert total > 30 and found / total > 0.6
