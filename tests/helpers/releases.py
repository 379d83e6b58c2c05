"""Releases around a detector so small that its file is written by hand."""

import shutil

import numpy as np
import yaml
from onnx import TensorProto, helper, numpy_helper, save

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.engines.base import open_engine
from qyolo_deploy.engines.heads import METADATA_KEY, head_metadata
from qyolo_deploy.release.bundle import write_release
from qyolo_deploy.release.manifest import (
    CreatedWith,
    EngineEntry,
    ModelCard,
    Postprocessing,
    Preprocessing,
    RecipeRef,
    ReleaseInfo,
)

ENGINE = "engines/onnxruntime/toy.onnx"
IMGSZ = 64
NAMES = ("dark", "bright")
THRESHOLDS = Postprocessing(conf=0.001, iou=0.6, max_det=300, multi_label=True)


def write_detector(path, seed=0):
    """One 8 x 8 convolution of stride 8: boxes of 20 to 40 px around the cells, scores by their colours."""
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((4 + len(NAMES), 3, 8, 8)) * 0.2).astype(np.float32)
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8)), 0).reshape(1, 2, 64) * 8 + 4
    boxes = np.concatenate((grid, np.full((1, 2, 64), 30)), 1).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["maps"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Reshape", ["maps", "shape"], ["flat"]),
        helper.make_node("Sigmoid", ["flat"], ["shares"]),
        helper.make_node("Split", ["shares", "sizes"], ["offsets", "scores"], axis=1),
        helper.make_node("Add", ["offsets", "boxes"], ["placed"]),
        helper.make_node("Concat", ["placed", "scores"], ["output0"], axis=1),
    ]
    constants = {
        "w": weights,
        "shape": np.array([1, 4 + len(NAMES), 64]),
        "sizes": np.array([4, len(NAMES)]),
        "boxes": boxes,
    }
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, IMGSZ, IMGSZ])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 4 + len(NAMES), 64])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def make_dataset(root):
    """Scenes of which only the first two classes are told, as the detector has no more; `two.yaml` names them."""
    from qyolo_deploy.data.synthetic import generate

    source = generate(root, seed=0, train_images=1, val_images=4, imgsz=IMGSZ)
    shutil.rmtree(root / "annotations")  # they tell six classes
    described = yaml.safe_load(source.read_text())
    described["names"] = {0: "striped disc", 1: "dotted disc"}
    for labels in (root / "labels").rglob("*.txt"):
        lines = [line for line in labels.read_text().splitlines() if int(line.split()[0]) < 2]
        labels.write_text("".join(f"{line}\n" for line in lines))
    (root / "two.yaml").write_text(yaml.safe_dump(described))
    return root


def write_raw_detector(path):
    """A detector that ends at its raw maps, of distances in cells and of class logits, with the metadata for them."""
    weights = (np.random.default_rng(0).standard_normal((4 + len(NAMES), 3, 8, 8)) * 0.2).astype(np.float32)
    sizes = np.array([4, len(NAMES)])
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["maps"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Abs", ["maps"], ["positive"]),
        helper.make_node("Split", ["positive", "sizes"], ["head0", "head1"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "raw toy",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, IMGSZ, IMGSZ])],
        [
            helper.make_tensor_value_info(f"head{index}", TensorProto.FLOAT, [1, size, 8, 8])
            for index, size in enumerate(sizes.tolist())
        ],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(sizes, "sizes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: head_metadata({"strides": [8], "bins": 1})})
    save(model, path)
    return path


def make_info(recipe_sha256, **changes):
    """Of a release with one engine."""
    engine = EngineEntry(
        view="onnxruntime",
        path=ENGINE,
        format="onnx",
        scheme="w4a8",
        digest="e" * 64,
        validated_with={"onnxruntime": "1.31.1"},
        metrics={"map50_95": 0.25},
    )
    fields = {
        "name": "toy",
        "version": "1.0.0",
        "created_with": CreatedWith(qyolo_deploy="0.1.0", environment={}),
        "recipe": RecipeRef(path="recipe.yaml", sha256=recipe_sha256),
        "lineage": (),
        "model": ModelCard(family="f", architecture="toy", names=NAMES, strides=(8,), imgsz=IMGSZ),
        "datasets": {"val": "c" * 64},
        "preprocessing": Preprocessing(letterbox="square"),
        "postprocessing": THRESHOLDS,
        "engines": (engine,),
        "gates": (),
        "licenses": {"model": "AGPL-3.0-or-later"},
    }
    return ReleaseInfo(**{**fields, **changes})


def make_release(folder, change=None, seed=0, more=None, **changes):
    """A release with golden vectors of its detector.

    Args:
        folder: Where to work; the release is `folder / "release"`.
        change: Is given the golden files by path, and may change them before they are released.
        seed: Of the detector that is released; the golden vectors are of seed 0.
        more: Further files by path.
        changes: What else the manifest says, see `ReleaseInfo`.
    """
    from qyolo_deploy.stages.golden import Subject, choose_pictures, make_golden

    folder.mkdir(exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text("name: toy\n", encoding="utf-8")
    runner = open_engine(write_detector(folder / "golden.onnx"))
    pictures = choose_pictures("generated", folder, IMGSZ, runner, THRESHOLDS)
    golden = make_golden({"onnxruntime": Subject(runner, "w4a8")}, pictures, THRESHOLDS, "generated")
    if change is not None:
        change(golden)
    files = {"recipe.yaml": recipe, ENGINE: write_detector(folder / "toy.onnx", seed), **golden, **(more or {})}
    return write_release(folder / "release", files, make_info(sha256_file(recipe), **changes))
