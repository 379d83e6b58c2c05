import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qyolo_deploy.data.letterbox import PAD_VALUE, Letterbox, letterbox, to_tensor


def noise(height, width):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "rect", "expected", "left", "top"),
    [
        # 640 / 32 + 0.5 is rounded up to 21 strides; 427 / 32 + 0.5 to 14, and 448 - 427 = 21: 10 above, 11 below.
        ((640, 427), True, (672, 448), 16, 10),
        ((640, 480), True, (672, 512), 16, 16),
        ((640, 427), False, (640, 640), 0, 106),
        ((500, 333), True, (672, 448), 16, 10),  # 333 * 1.28 = 426.24, rounded up to 427
        ((300, 600), True, (352, 672), 16, 16),
        ((375, 500), True, (512, 672), 16, 16),  # 375 * 1.28 is 480 exactly, though not in floats everywhere
    ],
)
def test_the_input_has_the_size_and_padding_of_yolov5(size, rect, expected, left, top):
    width, height = size
    padded, placed = letterbox(noise(height, width), 640, 32, rect)
    assert padded.shape == (expected[1], expected[0], 3)
    assert (placed.pad_x, placed.pad_y) == (left, top)
    assert placed.ratio == 640 / max(size)
    assert (placed.width, placed.height) == size


def test_an_image_of_the_right_size_is_only_padded():
    image = noise(50, 64)
    padded, _ = letterbox(image, 64)
    assert (padded[23:73, 16:80] == image).all()
    for border in (padded[:23], padded[73:], padded[:, :16], padded[:, 80:]):
        assert (border == PAD_VALUE).all()


def test_halving_averages_two_by_two_pixels():
    image = noise(64, 128)
    padded, _ = letterbox(image, 64)
    means = image.reshape(32, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(padded[16:48, 16:80] - means).max() <= 0.75


def test_enlarging_interpolates_between_neighbours():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 200
    padded, _ = letterbox(image, 64)
    # Bilinear with pixel centres at halves: 1/4 and 3/4 of the step on the two pixels at the edge.
    assert padded[26, 46:50, 0].tolist() == [0, 50, 150, 200]


@settings(max_examples=60)
@given(
    width=st.integers(8, 200),
    height=st.integers(8, 200),
    blocks=st.integers(1, 6),
    stride=st.sampled_from([16, 32]),
    rect=st.booleans(),
    corners=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
)
def test_boxes_return_to_the_image(width, height, blocks, stride, rect, corners):
    imgsz = blocks * stride
    padded, placed = letterbox(np.zeros((height, width, 3), np.uint8), imgsz, stride, rect)
    assert all(side % stride == 0 for side in padded.shape[:2])
    assert max(padded.shape[:2]) == (imgsz + stride if rect else imgsz)
    box = np.sort(np.array(corners, np.float64).reshape(2, 2), axis=0) * [width, height]
    moved = box * placed.ratio + [placed.pad_x, placed.pad_y]
    assert (moved <= np.array(padded.shape[1::-1]) + 1e-3).all()
    back = placed.to_original(moved.reshape(1, 4).astype(np.float32))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, box.reshape(1, 4), atol=1e-3 * max(1, 1 / placed.ratio))


def test_boxes_are_clipped_to_the_image():
    placed = Letterbox(0.5, 4.0, 8.0, 100, 60)
    boxes = placed.to_original(np.array([[-50, -50, 500, 500], [14, 18, 24, 28]], np.float32))
    assert boxes.tolist() == [[0, 0, 100, 60], [20, 20, 40, 40]]


def test_the_tensor_holds_planes_in_zero_to_one():
    image = noise(32, 64)
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 32, 64)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    assert tensor[0, 2, 5, 7] == np.float32(image[5, 7, 2]) / np.float32(255)
    assert to_tensor(np.full((1, 1, 3), 255, np.uint8)).max() == 1
