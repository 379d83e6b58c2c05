import numpy as np
import pytest

from qyolo_deploy.validate.detections import MAX_CANDIDATES, Detections, decode, is_end_to_end, nms


def output_of(*anchors, classes):
    """Columns (x, y, w, h, scores...) as `[4 + nc, A]`, filled up with anchors that detect nothing."""
    output = np.zeros((4 + classes, 21), np.float32)
    output[:, : len(anchors)] = np.array(anchors, np.float32).T
    return output


def test_boxes_become_corners():
    found = decode(output_of((100, 50, 20, 10, 0.5), classes=1), 0.25, 0.6, 300)
    np.testing.assert_array_equal(found.boxes, [[90, 45, 110, 55]])
    assert found.boxes.dtype == np.float32
    assert found.classes.dtype == np.int64


def test_multi_label_gives_each_class_above_the_threshold():
    output = output_of((100, 50, 20, 10, 0.5, 0.75, 0.125), classes=3)
    assert decode(output, 0.25, 0.6, 300).classes.tolist() == [1, 0]
    assert decode(output, 0.25, 0.6, 300, multi_label=False).classes.tolist() == [1]


def test_score_at_the_threshold_does_not_count():
    assert len(decode(output_of((100, 50, 20, 10, 0.25), classes=1), 0.25, 0.6, 300)) == 0


def test_overlap_suppresses_within_a_class_only():
    output = output_of((50, 50, 20, 20, 0.9, 0), (51, 50, 20, 20, 0.8, 0), (50, 51, 20, 20, 0, 0.7), classes=2)
    found = decode(output, 0.1, 0.6, 300)
    assert found.classes.tolist() == [0, 1]
    np.testing.assert_array_equal(found.scores, np.float32([0.9, 0.7]))


def test_box_at_exactly_the_threshold_stays():
    # 10 x 6 and 10 x 10 nested: IoU is 60 / 100.
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 6]], np.float32)
    classes = np.zeros(2, np.int64)
    assert nms(boxes, classes, 0.6, 300).tolist() == [0, 1]
    assert nms(boxes, classes, 0.59, 300).tolist() == [0]


def test_suppressed_box_suppresses_nothing():
    # Each overlaps the next by 0.6, the first and the last by a third.
    boxes = np.array([[0, 0, 8, 10], [2, 0, 10, 10], [4, 0, 12, 10]], np.float32)
    assert nms(boxes, np.zeros(3, np.int64), 0.5, 300).tolist() == [0, 2]


def test_boxes_without_area_stay():
    boxes = np.array([[5, 5, 5, 5], [5, 5, 5, 5]], np.float32)
    assert nms(boxes, np.zeros(2, np.int64), 0.5, 300).tolist() == [0, 1]


def test_nothing_above_the_threshold_gives_nothing():
    found = decode(np.zeros((84, 2100), np.float32), 0.001, 0.6, 300)
    assert found.boxes.shape == (0, 4)
    assert len(found) == 0


@pytest.mark.parametrize(("better", "found"), [(MAX_CANDIDATES - 1, 2), (MAX_CANDIDATES, 1)])
@pytest.mark.parametrize("score_of_last", [0.5, 0.25])
def test_candidates_beyond_the_limit_do_not_count(better, found, score_of_last):
    # Identical boxes, of which one stays, and then one elsewhere that ties with them or is worse.
    output = np.full((5, better + 1), 4, np.float32)
    output[0, -1] = 100
    output[4] = 0.5
    output[4, -1] = score_of_last
    assert len(decode(output, 0.01, 0.6, 300)) == found


def test_end_to_end_output_is_taken_without_suppression():
    output = np.zeros((300, 6), np.float32)
    output[:3] = [[0, 0, 10, 10, 0.5, 2], [1, 0, 11, 10, 0.75, 2], [0, 0, 9, 9, 0.1, 1]]
    found = decode(output, 0.25, 0.6, 300)
    np.testing.assert_array_equal(found.boxes, [[1, 0, 11, 10], [0, 0, 10, 10]])
    assert found.classes.tolist() == [2, 2]
    assert decode(output, 0.25, 0.6, 1).scores.tolist() == [0.75]


def test_two_classes_are_not_taken_for_an_end_to_end_head():
    assert not is_end_to_end((1, 6, 8400))
    assert is_end_to_end((1, 300, 6))


def test_detections_refuse_lengths_that_differ():
    with pytest.raises(ValueError, match="shapes"):
        Detections(np.zeros((2, 4), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int64))
