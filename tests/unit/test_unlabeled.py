"""Images without annotations behind a training split."""

import cv2
import numpy as np
import pytest

from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.data.synthetic import generate
from qyolo_deploy.data.unlabeled import add_unlabeled
from qyolo_deploy.errors import InputError
from qyolo_deploy.training.loader import Loader

SIZES = {"b/second.png": (40, 24), "a.png": (64, 48), "c.jpg": (30, 50)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    return load_dataset(generate(root, seed=0, train_images=5, val_images=1, imgsz=64), "train")


@pytest.fixture
def folder(tmp_path):
    """Three images of other sizes, one of them in a folder below, and a file that is none."""
    root = tmp_path / "unlabeled"
    for name, (width, height) in SIZES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(root / name), np.full((height, width, 3), 90, np.uint8))
    (root / "notes.txt").write_text("no image")
    return root


def test_they_come_behind_the_split_s_own(dataset, folder):
    joined = add_unlabeled(dataset, folder)
    assert joined.labeled == 5 and len(joined) == 8 and dataset.labeled is None
    assert joined.images[:5] == dataset.images
    added = joined.images[5:]
    assert [image.path.relative_to(folder).as_posix() for image in added] == sorted(SIZES)
    assert [(image.width, image.height) for image in added] == [SIZES[name] for name in sorted(SIZES)]
    assert len({image.image_id for image in joined.images}) == 8
    for ours, theirs in zip(joined.boxes[:5] + joined.classes[:5], dataset.boxes + dataset.classes, strict=True):
        assert ours is theirs
    assert [boxes.shape for boxes in joined.boxes[5:]] == [(0, 4)] * 3
    assert [classes.shape for classes in joined.classes[5:]] == [(0,)] * 3
    assert joined.ground_truth == dataset.ground_truth  # evaluation does not see them


def test_a_folder_without_images_is_refused(dataset, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=r"holds no images \(data.unlabeled\)"):
        add_unlabeled(dataset, tmp_path)


@pytest.mark.parametrize("link", [False, True])
def test_an_image_of_the_split_is_refused(dataset, tmp_path, link):
    """Without labels it would be trained as one that shows nothing; also behind a link."""
    folder = dataset.images[2].path.parent
    if link:
        folder = tmp_path
        (folder / "other.png").symlink_to(dataset.images[2].path)
    with pytest.raises(InputError, match="is an image of the split 'train' and of"):
        add_unlabeled(dataset, folder)


def test_a_broken_image_is_named(dataset, folder):
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.png"):
        add_unlabeled(dataset, folder)


def load(dataset, **settings):
    given = {"imgsz": 64, "batch": 4, "augment": None, "images": None, "workers": 0, "seed": 0}
    return Loader(dataset, **given | settings)


@pytest.mark.parametrize("images", [None, 6])
def test_batches_tell_which_images_have_labels(dataset, folder, images):
    """Also where a subset is drawn from both kinds."""
    loader = load(add_unlabeled(dataset, folder), images=images, batch=2)
    flags = {}
    for batch in loader.epoch(0):
        assert len(batch["labeled"]) == len(batch["im_file"]) == 2
        for slot, (file, labeled) in enumerate(zip(batch["im_file"], batch["labeled"], strict=True)):
            flags[file] = bool(labeled)
            assert labeled or not (batch["batch_idx"] == slot).any()
    assert len(flags) == (images or 8)
    assert all(labeled == (str(folder) not in file) for file, labeled in flags.items())
    assert 0 < sum(flags.values()) < len(flags)


def test_without_them_all_images_have_labels(dataset):
    assert all(all(batch["labeled"]) for batch in load(dataset).epoch(0))


def test_labelled_images_are_loaded_as_before(dataset, folder):
    """In the same places with the same boxes, whatever stands behind them."""
    (batch,) = load(dataset, batch=5).epoch(0)
    (joined,) = load(add_unlabeled(dataset, folder), batch=8).epoch(0)
    for slot, file in enumerate(batch["im_file"]):
        other = joined["im_file"].index(file)
        assert (joined["img"][other] == batch["img"][slot]).all()
        mine, theirs = joined["batch_idx"] == other, batch["batch_idx"] == slot
        assert (joined["bboxes"][mine] == batch["bboxes"][theirs]).all()
        assert mine.sum() == theirs.sum() > 0
