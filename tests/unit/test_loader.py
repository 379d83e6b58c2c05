import cv2
import numpy as np
import pytest
import torch
from helpers.training import IMGSZ, make_loader, same_batches

from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.data.records import DetectionDataset, ImageRecord
from qyolo_deploy.training.loader import Loader, calibration_batches


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_batches_go_by_seed_and_epoch_alone(train_scenes, mosaic):
    first = make_loader(train_scenes, mosaic=mosaic)
    epochs = [list(first.epoch(number)) for number in range(3)]
    for number in (2, 0, 1):  # in another order, as a resumed run sees them
        assert same_batches(make_loader(train_scenes, mosaic=mosaic).epoch(number), epochs[number])
    again = make_loader(train_scenes, mosaic=mosaic)
    assert same_batches(again.epoch(1), epochs[1]) and same_batches(again.epoch(1), epochs[1])
    assert not same_batches(epochs[0], epochs[1])
    assert not same_batches(make_loader(train_scenes, seed=1, mosaic=mosaic).epoch(0), epochs[0])


def test_what_was_drawn_before_does_not_matter(train_scenes):
    expected = list(make_loader(train_scenes).epoch(0))
    torch.rand(5), np.random.default_rng().random(3), np.random.random(3)  # noqa: NPY002
    assert same_batches(make_loader(train_scenes).epoch(0), expected)


def test_worker_processes_draw_by_seed_too(train_scenes):
    one = list(make_loader(train_scenes, workers=1, images=8).epoch(0))
    assert same_batches(make_loader(train_scenes, workers=1, images=8).epoch(0), one)


def test_batches_are_images_in_0_to_1_with_their_boxes(train_scenes):
    batches = list(make_loader(train_scenes).epoch(0))
    assert len(batches) == len(make_loader(train_scenes)) == 3
    for batch in batches:
        assert (batch["img"].shape, batch["img"].dtype) == ((4, 3, IMGSZ, IMGSZ), torch.float32)
        assert batch["img"].min() >= 0 and 0.5 < batch["img"].max() <= 1
        assert len(batch["cls"]) == len(batch["bboxes"]) == len(batch["batch_idx"]) > 0
        assert batch["bboxes"].min() >= 0 and batch["bboxes"].max() <= 1
        assert set(batch["cls"].flatten().tolist()) <= set(range(len(train_scenes.class_names)))
        assert set(batch["batch_idx"].tolist()) <= {0, 1, 2, 3}


def test_a_subset_is_chosen_by_seed(train_scenes):
    def files(loader):
        return sorted(name for batch in loader.epoch(0) for name in batch["im_file"])

    chosen = files(make_loader(train_scenes, images=5, batch=5))
    assert len(set(chosen)) == 5
    assert files(make_loader(train_scenes, images=5, batch=5)) == chosen
    assert files(make_loader(train_scenes, images=5, batch=5, seed=3)) != chosen
    assert len(make_loader(train_scenes, images=5, batch=2)) == 2  # the last, smaller one is left out
    assert len(make_loader(train_scenes, images=5, batch=16)) == 1  # unless it is the only one


def test_closing_mosaic_ends_it(train_scenes):
    loader = make_loader(train_scenes, mosaic=1.0, scale=0.0, translate=0.0, fliplr=0.0)
    with_mosaic = sum(len(batch["cls"]) for batch in loader.epoch(0))
    loader.close_mosaic()
    without = sum(len(batch["cls"]) for batch in loader.epoch(0))
    assert without == sum(len(classes) for classes in train_scenes.classes)
    assert with_mosaic != without


def test_images_and_boxes_lie_where_the_letterbox_puts_them(tmp_path):
    """A wide and a tall image, without augmentation: pixels as in calibration and validation, boxes with them."""
    rng = np.random.default_rng(0)
    sizes, boxes = [(64, 32), (24, 64)], [[[4, 2, 20, 30], [0, 0, 64, 32]], [[1.5, 10, 23, 64]]]
    records = []
    for number, (width, height) in enumerate(sizes):
        path = tmp_path / f"{number}.png"
        assert cv2.imwrite(str(path), rng.integers(0, 256, (height, width, 3), np.uint8))
        records.append(ImageRecord(number, path, width, height))
    dataset = DetectionDataset(
        source=tmp_path,
        split="train",
        class_names=("a", "b"),
        category_ids=(1, 2),
        images=tuple(records),
        boxes=tuple(np.array(part, np.float32) for part in boxes),
        classes=(np.array([1, 0]), np.array([1])),
        ground_truth={"images": [], "annotations": []},
        annotation_file=None,
    )
    loader = Loader(dataset, imgsz=IMGSZ, batch=2, augment=None, images=None, workers=0, seed=0)
    (batch,) = loader.epoch(0)
    pixels = torch.cat(list(calibration_batches(dataset, 2, IMGSZ, 1, seed=0)))
    for slot, file in enumerate(batch["im_file"]):
        number = [str(record.path) for record in records].index(file)
        image, placed = letterbox(read_image(records[number].path), IMGSZ, rect=False)
        torch.testing.assert_close(batch["img"][slot], torch.from_numpy(to_tensor(image)[0]), rtol=0, atol=1e-6)
        assert any(torch.equal(torch.from_numpy(to_tensor(image)[0]), found) for found in pixels)
        mine = batch["batch_idx"] == slot
        assert batch["cls"][mine].flatten().tolist() == dataset.classes[number].tolist()
        corners = np.array(boxes[number]) * placed.ratio + [placed.pad_x, placed.pad_y] * 2
        centres, spans = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        np.testing.assert_allclose(batch["bboxes"][mine], np.hstack([centres, spans]) / IMGSZ, atol=1e-5)
