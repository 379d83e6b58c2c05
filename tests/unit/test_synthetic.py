import hashlib
import json
import math

import numpy as np
import pytest

from qyolo_deploy.data import synthetic, synthetic_shapes
from qyolo_deploy.data.synthetic import generate
from qyolo_deploy.data.synthetic_scene import CLASS_NAMES, draw_scene
from qyolo_deploy.errors import InputError

SMALL = {"seed": 3, "train_images": 6, "val_images": 4, "imgsz": 64}

EXPECTED_OBJECTS = [
    ("dotted disc", (46, 78, 135, 167)),
    ("dotted square", (25, 90, 58, 123)),
    ("striped square", (145, 66, 181, 102)),
    ("dotted disc", (184, 141, 233, 190)),
    ("star", (235, 84, 247, 95)),
    ("dotted square", (155, 22, 181, 47)),
    ("striped square", (136, 17, 150, 31)),
    ("dotted square", (0, 175, 14, 192)),
    ("ring", (136, 134, 144, 142)),
]
EXPECTED_MEAN = [111.51, 136.85, 89.82]


def digests(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    generate(tmp_path / "a", **SMALL)
    monkeypatch.setattr(synthetic.os, "cpu_count", lambda: 1)
    generate(tmp_path / "b", **SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(digests(tmp_path / "a")) == 2 * 10 + 4


def test_no_two_images_are_alike(tmp_path):
    generate(tmp_path / "a", **SMALL)
    generate(tmp_path / "b", **{**SMALL, "seed": 4})
    images = [d for root in ("a", "b") for name, d in digests(tmp_path / root).items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images) == 20


def test_a_longer_split_begins_with_the_shorter_one(tmp_path):
    generate(tmp_path / "a", **SMALL)
    generate(tmp_path / "b", **{**SMALL, "train_images": 8})
    short, long = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert {name for name in short if short[name] != long[name]} == {
        "annotations/instances_train.json",
        "synthetic.json",
    }


def test_a_complete_dataset_is_left_alone_and_another_is_replaced(tmp_path):
    root = tmp_path / "deep" / "data"
    first = generate(root, **SMALL)
    assert first == root / "synthetic.yaml"
    before = (root / "synthetic.yaml").stat().st_mtime_ns
    calls = []
    generate(root, **SMALL, progress=lambda done, total: calls.append((done, total)))
    assert calls == []
    assert (root / "synthetic.yaml").stat().st_mtime_ns == before
    generate(root, **{**SMALL, "val_images": 5}, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(index, 11) for index in range(1, 12)]
    assert len(list((root / "images" / "val").iterdir())) == 5


def test_a_dataset_that_lost_an_image_is_made_again(tmp_path):
    generate(tmp_path / "a", **SMALL)
    before = digests(tmp_path / "a")
    (tmp_path / "a" / "images" / "val" / "000002.jpg").unlink()
    generate(tmp_path / "a", **SMALL)
    assert digests(tmp_path / "a") == before


def test_an_interruption_leaves_nothing_behind(tmp_path):
    def interrupt(done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "a", **SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_labels_and_annotations_agree(tmp_path):
    root = generate(tmp_path / "a", **SMALL).parent
    for split in ("train", "val"):
        coco = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        assert [c["name"] for c in coco["categories"]] == list(CLASS_NAMES)
        for image in coco["images"]:
            lines = (root / "labels" / split / f"{image['file_name'][:-4]}.txt").read_text().splitlines()
            boxes = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            assert len(lines) == len(boxes)
            for line, annotation in zip(lines, boxes, strict=True):
                index, *xywh = (float(word) for word in line.split())
                x, y, w, h = annotation["bbox"]
                assert index == annotation["category_id"] - 1
                np.testing.assert_allclose(np.array(xywh) * 64, [x + w / 2, y + h / 2, w, h], atol=1e-3)
                assert 0 < annotation["area"] <= w * h


def scenes(count, imgsz=256):
    return [draw_scene(np.random.default_rng([11, index]), imgsz) for index in range(count)]


def test_scenes_have_all_classes_and_sizes_and_stay_inside():
    drawn = scenes(60)
    assert all(image.shape == (256, 256, 3) and image.dtype == np.uint8 for image, _ in drawn)
    objects = [item for _, items in drawn for item in items]
    boxes = np.array([item.box for item in objects])
    assert boxes.min() >= 0
    assert boxes.max() <= 256
    longest = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert longest.min() < 12
    assert longest.max() > 110
    assert np.bincount([item.class_index for item in objects], minlength=6).min() > 25
    assert max(len(items) for _, items in drawn) <= 12


def test_boxes_are_tight_around_whole_discs():
    fill = []
    for _, items in scenes(60):
        for item in items:
            x0, y0, x1, y1 = item.box
            whole = min(x0, y0) > 0 and max(x1, y1) < 256 and abs((x1 - x0) - (y1 - y0)) <= 1
            if CLASS_NAMES[item.class_index].endswith("disc") and x1 - x0 >= 16 and whole:
                fill.append(item.area_px / ((x1 - x0) * (y1 - y0)))
    assert len(fill) > 20
    # A disc covers pi / 4 of its bounding box; a box that is loose by one px a side at 24 px would give 0.67.
    assert np.median(fill) == pytest.approx(math.pi / 4, abs=0.015)
    assert max(fill) < 0.85


# Areas in units of radius squared, from plane geometry.
@pytest.mark.parametrize(
    ("shape", "area"),
    [
        (synthetic_shapes.disc, math.pi),
        (synthetic_shapes.half_disc, math.pi / 2),
        (synthetic_shapes.ring, math.pi * (1 - 0.6**2)),
        (synthetic_shapes.triangle, 3 * math.sqrt(3) / 4),
        (synthetic_shapes.pentagon, 5 / 2 * math.sin(math.radians(72))),
        (
            synthetic_shapes.star,
            5 * math.sin(math.radians(36)) * math.cos(math.radians(72)) / math.cos(math.radians(36)),
        ),
        (synthetic_shapes.cross, 2 * 2 * 0.6 - 0.6**2),
        (synthetic_shapes.bar, 2 * 0.5 - (4 - math.pi) * 0.05**2),
        (synthetic_shapes.rounded_square, 1.7**2 - (4 - math.pi) * 0.25**2),
    ],
)
def test_shapes_have_the_area_of_geometry(shape, area):
    grid = np.linspace(-120, 120, 769, dtype=np.float32)
    distance = shape(grid[None, :], grid[:, None], 100.0)
    assert (distance < 0).mean() * 2.4**2 == pytest.approx(area, rel=0.01)


@pytest.mark.parametrize(
    ("texture", "share"),
    [
        (synthetic_shapes.stripes, 0.5),
        (synthetic_shapes.checks, 0.5),
        (synthetic_shapes.dots, math.pi * 0.32**2),
        (synthetic_shapes.plain, 0),
    ],
)
def test_textures_cover_their_share(texture, share):
    u, v = np.meshgrid(np.arange(240, dtype=np.float32) + 0.5, np.arange(240, dtype=np.float32) + 0.5)
    tone = texture(u, v, 24.0)
    assert tone.min() >= 0
    assert tone.max() <= 1
    assert tone.mean() == pytest.approx(share, abs=0.01)


def test_the_scenes_are_those_that_the_shipped_checkpoint_was_trained_on():
    image, items = draw_scene(np.random.default_rng([0, 0, 0]), 256)
    found = [(CLASS_NAMES[item.class_index], item.box) for item in items]
    assert found == EXPECTED_OBJECTS, "raise GENERATOR_VERSION and train the checkpoint again"
    assert image.mean(axis=(0, 1)) == pytest.approx(EXPECTED_MEAN, abs=0.02)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"train_images": 0}, "train_images"), ({"imgsz": 16}, "imgsz"), ({"seed": -1}, "seed")],
)
def test_parameters_out_of_range_are_refused(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        generate(tmp_path / "a", **{**SMALL, **change})
    assert list(tmp_path.iterdir()) == []


def test_foreign_folders_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not overwritten"):
        generate(tmp_path, **SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/data: synthetic data could not be written"):
        generate(tmp_path / "file" / "data", **SMALL)
