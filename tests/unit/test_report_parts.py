"""What stage `validate` writes down of a build beside its numbers, on a tiny finished one of its own making."""

import base64
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.data.images import read_image
from qyolo_deploy.stages.examples import contact_sheet, describe_images
from qyolo_deploy.stages.report_parts import describe_layers, shorten_numbers, to_text
from qyolo_deploy.validate.results import ResultTable

NUMBERS = st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.none() | st.booleans()
TEXTS = st.text(alphabet='[]{}", \n\\1a', max_size=8)


@given(
    st.recursive(
        NUMBERS | TEXTS,
        lambda part: st.lists(part, max_size=4) | st.dictionaries(TEXTS, part, max_size=4),
        max_leaves=20,
    )
)
def test_the_text_of_a_report_says_what_the_report_does(value):
    assert json.loads(to_text(value)) == value


def test_lists_of_numbers_take_one_line_and_pictures_none():
    text = to_text(
        {"recall": [0.0, 0.5, None], "names": ["a", "b"], "examples": [{"webp_base64": "UklGRg", "score": 1}]}
    )
    assert "[0.0, 0.5, null]" in text
    assert "webp" not in text and "UklGRg" not in text
    assert json.loads(text)["examples"] == [{"score": 1}]


def test_numbers_have_six_digits_and_what_is_none_becomes_null():
    assert shorten_numbers({"a": [0.123456789, float("nan"), float("inf"), 7, True, "x"]}) == {
        "a": [0.123457, None, None, 7, True, "x"]
    }


def test_layers_tell_the_scales_of_the_integers(quantized):
    told = [{"name": name, "weight_bits": 4, "activation_bits": 8} for name in quantized.layers]
    context = SimpleNamespace(artifacts={"train": SimpleNamespace(info={"layers": told})})
    layers = describe_layers(context, quantized)
    assert [layer["name"] for layer in layers] == list(quantized.layers)
    for layer, integers in zip(layers, quantized.layers.values(), strict=True):
        scales = np.sort(integers.qparams.scale.astype(np.float64))
        ends = [layer["weight_scale"][key] for key in ("min", "max")]
        assert ends == pytest.approx([scales[0], scales[-1]], rel=1e-5)
        assert scales[0] <= layer["weight_scale"]["median"] * (1 + 1e-5) <= scales[-1] * (1 + 2e-5)
        qparams = quantized.activations[integers.input]
        assert layer["input_scale"] == pytest.approx(float(qparams.scale), rel=1e-5)
        assert (layer["input_zero_point"], layer["weights"]) == (int(qparams.zero_point), integers.weight.size)


def decoded(webp):
    return cv2.imdecode(np.frombuffer(base64.b64decode(webp), np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]


def test_a_contact_sheet_shows_the_first_images_in_their_order(train_scenes):
    sheet = decoded(contact_sheet(train_scenes))
    assert sheet.shape == (72, 12 * 72, 3)  # twelve scenes
    for place, record in enumerate(train_scenes.images):
        tile = sheet[:, place * 72 : (place + 1) * 72].astype(float)
        image = cv2.resize(read_image(record.path), (72, 72), interpolation=cv2.INTER_AREA).astype(float)
        assert np.abs(tile - image).mean() < 12


def test_examples_are_the_images_on_which_an_engine_loses_most(train_scenes):
    dataset = load_dataset(train_scenes.source, "train")
    truth = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in dataset.ground_truth["annotations"]
    ]
    lost = {dataset.images[place].image_id for place in (2, 5)}
    engine = [result for result in truth if result["image_id"] not in lost]
    full = ResultTable.from_coco(truth)
    told = describe_images(dataset, {"float": full, "fake_quantized": full, "openvino": ResultTable.from_coco(engine)})
    shown = told["examples"]
    assert len(shown) == 8 and set(shown[0]["views"]) == {"float", "openvino"}
    names = [dataset.images[place].path.name for place in (2, 5)]
    assert {example["title"].rpartition("/")[2] for example in shown[:2]} == set(names)
    assert [example["views"]["openvino"]["score"] for example in shown[:3]] == [0, 0, 1]
    objects = sum(result["image_id"] in lost for result in truth)
    totals = told["views"]["openvino"]
    assert (totals["missed"], totals["wrong"], totals["images_worse"], totals["images_better"]) == (objects, 0, 2, 0)
    assert told["views"]["float"]["right"] == len(truth)
    record = next(image for image in dataset.images if image.path.name == shown[0]["title"].rpartition("/")[2])
    assert decoded(shown[0]["webp_base64"]).shape == read_image(record.path).shape
    kinds = {box["kind"] for box in shown[0]["views"]["openvino"]["boxes"]}
    assert kinds == {"missed"} and "score" not in shown[0]["views"]["openvino"]["boxes"][0]
