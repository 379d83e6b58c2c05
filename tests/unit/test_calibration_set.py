"""Calibration subsets: choosing, writing, finding the images again, and the files that ship."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qyolo_deploy.artifact import canonical_json, sha256_file
from qyolo_deploy.data import calibration_choice
from qyolo_deploy.data.calibration import CalibrationSet, read_calibration_set
from qyolo_deploy.data.calibration_check import find_generator, select_images
from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.data.synthetic import PARAMETERS_FILE, generate
from qyolo_deploy.errors import IntegrityError
from qyolo_deploy.stages.calibration import (
    CalibrationChoice,
    count_classes,
    create_calibration_set,
    verify_calibration_set,
)

SHIPPED = sorted((Path(__file__).parents[2] / "calibration").glob("*.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "made"
    generate(root, seed=5, train_images=20, val_images=4, imgsz=64)
    return root


@pytest.fixture
def root(made, tmp_path):
    """Scenes as if they were photographs: nothing tells any more that they were generated."""
    copy = Path(shutil.copytree(made, tmp_path / "made"))
    (copy / PARAMETERS_FILE).unlink()
    return copy


def create(root, images=6, out="subset.json", **choice):
    path = root.parent / out
    path.unlink(missing_ok=True)
    return create_calibration_set(root, path, CalibrationChoice(images, imgsz=64, **choice)), path


def names(calibration):
    return [image.file_name for image in calibration.images]


# --- the file -----------------------------------------------------------------------------------------------


def test_the_file_is_canonical_and_gives_the_same_subset_again(root):
    subset, path = create(root, method="balanced", seed=3, dataset="shapes", origin="a place", license="CC0-1.0")
    assert path.read_text() == subset.to_text() == canonical_json(json.loads(path.read_text())) + "\n"
    assert read_calibration_set(path) == subset
    assert (subset.schema_version, subset.name, subset.method, subset.seed) == (1, "subset", "balanced", 3)
    told = {"dataset": "shapes", "split": "train", "origin": "a place", "license": "CC0-1.0", "generator": None}
    assert subset.source.model_dump() == told
    assert subset.preprocessing.imgsz == 64
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    assert read_calibration_set(path).digest == subset.digest


def test_images_are_told_by_name_id_content_and_size(root):
    subset, _ = create(root)
    training = {image.path.name: image for image in load_dataset(root, "train").images}
    for image in subset.images:
        there = training[image.file_name]
        assert (image.id, image.width, image.height) == (there.image_id, there.width, there.height)
        assert image.sha256 == sha256_file(there.path)


def test_names_begin_at_the_common_folder_and_ids_are_those_of_annotations_only(root):
    """Numbers that only count the images of this copy would mean others elsewhere."""
    shutil.rmtree(root / "annotations")
    for kind in ("images", "labels"):
        (root / kind / "train" / "odd").mkdir()
        for path in sorted((root / kind / "train").glob("*[13579].*")):
            path.rename(path.parent / "odd" / path.name)
    subset, _ = create(root, 20)
    assert {image.id for image in subset.images} == {None}
    assert sorted(names(subset)) == sorted([f"{i:06d}.jpg" if i % 2 == 0 else f"odd/{i:06d}.jpg" for i in range(20)])
    assert verify_calibration_set(root.parent / "subset.json", root)[0] == subset


CHARACTERS = st.characters(codec="utf-8", exclude_characters="\\:/.", min_codepoint=32)


@settings(max_examples=50)
@given(
    files=st.lists(st.text(CHARACTERS, min_size=1), min_size=1, max_size=4, unique=True),
    text=st.none() | st.text(CHARACTERS),
    seed=st.integers(0, 2**40),
)
def test_whatever_it_tells_is_read_back(files, text, seed, tmp_path_factory):
    image = {"id": None, "sha256": "0" * 64, "width": 3, "height": 4}
    content = {
        "schema_version": 1,
        "name": "any",
        "method": "random",
        "seed": seed,
        "source": {"dataset": "any", "origin": text, "license": text},
        "preprocessing": {"imgsz": 32},
        "images": [{**image, "file_name": f"x/{name}"} for name in files],
    }
    subset = CalibrationSet.model_validate_json(canonical_json(content))
    path = tmp_path_factory.mktemp("any") / "any.json"
    path.write_text(subset.to_text(), encoding="utf-8")
    assert read_calibration_set(path) == subset


# --- the choice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "balanced"])
def test_the_choice_follows_names_and_content_not_place_or_order(root, tmp_path, method):
    _, path = create(root, method=method)
    moved = Path(shutil.copytree(root, tmp_path / "elsewhere" / "made"))
    lines = [f"images/train/{path.name}" for path in sorted((moved / "images" / "train").iterdir(), reverse=True)]
    (moved / "train.txt").write_text("\n".join(lines))
    dataset = moved / "synthetic.yaml"
    dataset.write_text(yaml.safe_dump({**yaml.safe_load(dataset.read_text()), "train": "train.txt"}))
    assert create(moved, method=method)[1].read_bytes() == path.read_bytes()


def test_the_seed_decides_chance_and_between_equals(root):
    chosen = [names(create(root, 20, seed=seed)[0]) for seed in range(3)]
    assert sorted(chosen[0]) == sorted(chosen[1]) == sorted(chosen[2])
    assert chosen[0] != chosen[1] != chosen[2] != chosen[0]
    shutil.rmtree(root / "annotations")
    for path in (root / "labels" / "train").iterdir():
        path.write_text("0 0.5 0.5 0.2 0.2\n")
    assert names(create(root, 20, method="balanced", seed=2)[0]) == chosen[2]


def test_the_first_images_are_the_smaller_subset(root):
    whole, _ = create(root, 20, method="balanced")
    assert sorted(names(whole)) == [f"{index:06d}.jpg" for index in range(20)]
    assert names(create(root, 7, method="balanced")[0]) == names(whole)[:7]


OBJECTS = arrays(np.int64, st.tuples(st.integers(1, 9), st.integers(1, 4)), elements=st.integers(0, 3))


def unevenness(counts):
    return len(counts) * sum(n * n for n in counts) - sum(counts) ** 2


def balance_one_by_one(objects, count):
    """`balance` word by word, from the sums instead of from what each image adds to them."""
    objects = objects[:, objects.any(axis=0)].tolist()
    shown = [[int(n > 0) for n in row] for row in objects]
    chosen = []

    def sums(rows, more=()):
        return [sum(rows[i][c] for i in (*chosen, *more)) for c in range(len(rows[0]))]

    while len(chosen) < count:
        left = [i for i in range(len(objects)) if i not in chosen]
        classes = [c for c in range(len(objects[0])) if any(shown[i][c] for i in left)]
        if not classes:
            return chosen + left[: count - len(chosen)]
        totals = [sum(row[c] for row in shown) for c in range(len(objects[0]))]
        served = min(classes, key=lambda c: (sums(shown)[c], totals[c], c))
        candidates = [i for i in left if shown[i][served]]
        chosen.append(min(candidates, key=lambda i: (unevenness(sums(shown, [i])), unevenness(sums(objects, [i])), i)))
    return chosen


@settings(max_examples=100)
@given(objects=OBJECTS, data=st.data())
def test_balance_does_what_its_definition_says(objects, data):
    count = data.draw(st.integers(1, len(objects)))
    chosen = calibration_choice.balance(objects, count)
    assert chosen == balance_one_by_one(objects, count)
    assert len(set(chosen)) == count


def test_balance_shows_rare_classes_that_chance_leaves_out():
    rng = np.random.default_rng(0)
    objects = (rng.random((400, 20)) < np.geomspace(0.9, 0.005, 20)) * rng.integers(1, 5, (400, 20))
    balanced = (objects[calibration_choice.balance(objects, 40)] > 0).sum(axis=0)
    by_chance = (objects[:40] > 0).sum(axis=0)
    totals = (objects > 0).sum(axis=0)
    assert (by_chance == 0).any()
    assert (balanced >= np.minimum(totals, 2)).all()
    assert unevenness(balanced.tolist()) < unevenness(by_chance.tolist()) / 2


POINTS = arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 3)), elements=st.integers(-4, 4).map(float))


@settings(max_examples=100)
@given(points=POINTS, data=st.data())
def test_spread_takes_what_is_farthest_from_all_chosen(points, data):
    count = data.draw(st.integers(1, len(points)))
    chosen = calibration_choice.spread(points, count)
    assert len(set(chosen)) == count
    centred = points - points.astype(float).mean(axis=0)
    deviation = centred.std(axis=0)
    standard = centred / np.where(deviation > 0, deviation, 1)
    distance = np.linalg.norm(standard[:, None] - standard[None], axis=2)
    lengths = np.linalg.norm(standard, axis=1)
    assert lengths[chosen[0]] == pytest.approx(lengths.min(), abs=1e-6)
    for step in range(1, count):
        left = [index for index in range(len(points)) if index not in chosen[:step]]
        farthest = max(distance[index, chosen[:step]].min() for index in left)
        assert distance[chosen[step], chosen[:step]].min() == pytest.approx(farthest, abs=1e-6)


def test_spread_ignores_units_and_dimensions_that_never_change():
    points = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    other = np.hstack([points * [1, 1000, 0.01, 5] + [0, 7, 0, -3], np.full((50, 2), 0.1)]).astype(np.float32)
    assert calibration_choice.spread(points, 12) == calibration_choice.spread(other, 12)


def test_coverage_is_recorded_with_its_model_and_repeats_itself(root, repository):
    weights = {"method": "coverage", "weights": "builtin:quickstart"}
    subset, path = create(root, **weights)
    checkpoint = repository / "qyolo_deploy" / "assets" / "quickstart.safetensors"
    assert subset.weights.model_dump() == {"file_name": "quickstart.safetensors", "sha256": sha256_file(checkpoint)}
    text = path.read_text()
    assert create(root, **weights)[1].read_text() == text
    assert names(create(root, 3, **weights)[0]) == names(subset)[:3]


def test_descriptions_of_images_are_moments_of_every_block_and_do_not_depend_on_neighbours(root, repository):
    import torch

    from qyolo_deploy.data.images import read_image
    from qyolo_deploy.data.letterbox import letterbox, to_tensor
    from qyolo_deploy.graph.features import Teacher
    from qyolo_deploy.models.registry import load_detector
    from qyolo_deploy.stages.coverage import describe_images

    weights = repository / "qyolo_deploy" / "assets" / "quickstart.safetensors"
    images = load_dataset(root, "train").images[:3]
    rows = describe_images(images, weights, 96)
    assert (describe_images(images[::-1], weights, 96) == rows[::-1]).all()
    pixels = torch.from_numpy(to_tensor(letterbox(read_image(images[1].path), 96, rect=False)[0]))
    _, blocks = Teacher(load_detector(weights, None, None, 0))(pixels)
    moments = [part for block in blocks for part in (block[0].mean((1, 2)), block[0].flatten(1).std(1, correction=0))]
    np.testing.assert_allclose(rows[1], torch.cat(moments), rtol=1e-4, atol=1e-5)


# --- finding the images again -------------------------------------------------------------------------------


def test_images_come_in_the_order_of_the_subset_with_their_labels(root):
    subset, _ = create(root, method="balanced")
    training = load_dataset(root, "train")
    found = select_images(subset, training).dataset
    assert [image.path.name for image in found.images] == names(subset)
    for image, boxes, classes in zip(found.images, found.boxes, found.classes, strict=True):
        index = training.images.index(image)
        assert boxes is training.boxes[index] and classes is training.classes[index]
    ids = {image.image_id for image in found.images}
    assert {entry["id"] for entry in found.ground_truth["images"]} == ids
    whole = training.ground_truth["annotations"]
    assert found.ground_truth["annotations"] == [entry for entry in whole if entry["image_id"] in ids]


def test_images_are_found_in_other_layouts_by_the_end_of_their_path(root, tmp_path):
    """Also where another folder holds another image of the same name."""
    subset, path = create(root, 4)
    other = tmp_path / "other"
    shutil.copytree(root / "images" / "train", other / "images" / "deep" / "train")
    (other / "images" / "a").mkdir()
    cv2.imwrite(str(other / "images" / "a" / names(subset)[0]), np.full((64, 64, 3), 7, np.uint8))
    shutil.copytree(root / "images" / "val", other / "val")
    (other / "data.yaml").write_text(yaml.safe_dump({"train": "images", "val": "val", "names": ["shape"]}))
    _, selection = verify_calibration_set(path, other)
    assert {image.path.parent.name for image in selection.dataset.images} == {"train"}
    assert [image.path.name for image in selection.dataset.images] == names(subset)


def repaint(root, name):
    cv2.imwrite(str(root / "images" / "train" / name), np.full((64, 64, 3), 99, np.uint8))


def test_scenes_of_the_same_generator_may_have_other_bytes(made, tmp_path):
    """Another version of OpenCV draws them a little differently."""
    root = Path(shutil.copytree(made, tmp_path / "made"))
    subset, path = create(root)
    assert subset.source.generator.model_dump() == {"version": 1, "seed": 5, "imgsz": 64}
    assert verify_calibration_set(path, root)[1].redrawn == 0
    repaint(root, names(subset)[2])
    _, selection = verify_calibration_set(path, root)
    assert selection.redrawn == 1
    assert selection.digests[2] == sha256_file(root / "images" / "train" / names(subset)[2])
    assert [image.path.name for image in selection.dataset.images] == names(subset)


@pytest.mark.parametrize("change", [{"seed": 6}, {"imgsz": 96}, {"version": 2}, {"seed": "x"}, None])
def test_scenes_of_another_generator_must_have_the_recorded_bytes(made, tmp_path, change):
    root = Path(shutil.copytree(made, tmp_path / "made"))
    subset, path = create(root)
    parameters = root / PARAMETERS_FILE
    if change is None:
        parameters.write_text("[]")
    else:
        parameters.write_text(json.dumps({**json.loads(parameters.read_text()), **change}))
    verify_calibration_set(path, root)
    repaint(root, names(subset)[2])
    with pytest.raises(IntegrityError, match=names(subset)[2]):
        verify_calibration_set(path, root)


def test_objects_are_counted_by_class(root):
    subset, _ = create(root, method="balanced")
    found = select_images(subset, load_dataset(root, "train")).dataset
    for index, row in enumerate(count_classes(subset, root)):
        assert row["name"] == found.class_names[index]
        assert row["objects"] == sum((classes == index).sum() for classes in found.classes)
        assert row["images"] == sum((classes == index).any() for classes in found.classes)


def test_all_but_coverage_works_without_torch(root):
    code = """
import sys
from qyolo_deploy import CalibrationChoice, create_calibration_set, read_calibration_set, verify_calibration_set
from qyolo_deploy.errors import RuntimeMissingError
from qyolo_deploy.stages.calibration import count_classes
sys.modules["torch"] = None
root, out = sys.argv[1:]
for method in ("random", "balanced"):
    create_calibration_set(root, f"{out}/{method}.json", CalibrationChoice(4, method))
    subset, _ = verify_calibration_set(f"{out}/{method}.json", root)
    assert count_classes(read_calibration_set(__import__("pathlib").Path(f"{out}/{method}.json")), root)
try:
    create_calibration_set(root, f"{out}/c.json", CalibrationChoice(4, "coverage", weights="builtin:quickstart"))
except RuntimeMissingError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(root), str(root.parent)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "calibration by coverage: the package 'torch' is not installed\n"


# --- what ships ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_canonical_and_say_what_they_are(path):
    subset = read_calibration_set(path)
    assert path.read_text(encoding="utf-8") == subset.to_text()
    assert subset.name == path.stem == f"{path.stem.rpartition('_')[0]}_{len(subset.images)}"
    assert (subset.method, subset.seed) == ("balanced", 0)
    assert subset.source.origin and subset.source.license
    assert all("/" not in image.file_name for image in subset.images)


@pytest.mark.parametrize("images", [128, 320])
def test_the_subsets_of_coco_are_those_that_create_makes(images, repository, data_root, tmp_path):
    if not (data_root / "coco-subset").is_dir():
        pytest.skip("QYOLO_DATA has no coco-subset")
    path = repository / "calibration" / f"coco_train2017_{images}.json"
    subset, selection = verify_calibration_set(path, data_root / "coco-subset")
    assert [image.image_id for image in selection.dataset.images] == [image.id for image in subset.images]
    assert all(image.file_name == f"{image.id:012d}.jpg" for image in subset.images)
    assert min(row["images"] for row in count_classes(subset, data_root / "coco-subset")) >= 2
    choice = CalibrationChoice(images, "balanced")
    assert create_calibration_set(data_root / "coco-subset", tmp_path / "again.json", choice).images == subset.images


def test_the_quickstart_s_subset_fits_its_scenes(repository, tmp_path):
    subset = read_calibration_set(repository / "calibration" / "quickstart_128.json")
    recipe = yaml.safe_load((repository / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    scenes, imgsz = recipe["data"]["synthetic"], recipe["model"]["imgsz"]
    root = tmp_path / "scenes"
    generate(root, seed=scenes["seed"], train_images=scenes["train_images"], val_images=1, imgsz=imgsz)
    training = load_dataset(root, "train")
    assert subset.source.generator == find_generator(training)
    assert subset.preprocessing.imgsz == imgsz
    assert len(select_images(subset, training).dataset) == 128
    again = create_calibration_set(root, tmp_path / "again.json", CalibrationChoice(128, "balanced", imgsz=imgsz))
    assert names(again) == names(subset)  # boxes do not depend on how OpenCV draws
