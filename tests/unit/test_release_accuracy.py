"""`qyolo validate RELEASE`: what the manifest says is what is done, or it is refused."""

import numpy as np
import pytest
from helpers.releases import ENGINE, IMGSZ, THRESHOLDS, make_dataset, make_info, write_detector

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.device.accuracy import validate_release
from qyolo_deploy.errors import InputError
from qyolo_deploy.release.bundle import write_release
from qyolo_deploy.release.manifest import Preprocessing
from qyolo_deploy.release.verify import verify_release
from qyolo_deploy.validate.run import validate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture
def make(tmp_path):
    def make(**changes):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("name: toy\n")
        files = {"recipe.yaml": recipe, ENGINE: write_detector(tmp_path / "toy.onnx")}
        return verify_release(write_release(tmp_path / "release", files, make_info(sha256_file(recipe), **changes)))

    return make


def test_it_measures_what_the_engine_alone_measures_with_the_same_settings(make, data):
    thresholds = THRESHOLDS.model_copy(update={"conf": 0.3, "iou": 0.2, "max_det": 7})
    release = make(postprocessing=thresholds)
    check = validate_release(release, data / "two.yaml")
    alone = validate(release.path / ENGINE, data / "two.yaml", IMGSZ, 0.3, 0.2, 7)
    assert check.report.metrics == alone.metrics and np.isfinite(check.report.metrics.map50_95)
    assert check.report.thresholds == {"conf": 0.3, "iou": 0.2, "max_det": 7}
    assert (check.released, check.same_data) == ({"map50_95": 0.25}, False)


def test_the_data_of_the_release_are_known_again(make, data):
    first = validate_release(make(), data / "two.yaml")
    (entry,) = make_info("0" * 64).engines
    told = entry.model_copy(update={"validated_on": {"val": first.report.digests["data"]}})
    assert validate_release(make(engines=(told,)), data / "two.yaml").same_data


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"color": "BGR"}, "preprocessing.color is 'BGR', but only 'RGB'"),
        ({"scale": 1.0}, "preprocessing.scale is 1.0"),
        ({"pad_value": 0}, "preprocessing.pad_value is 0, but only 114"),
        ({"layout": "NHWC"}, "preprocessing.layout"),
    ],
)
def test_another_preprocessing_is_refused_rather_than_ignored(make, data, changes, match):
    with pytest.raises(InputError, match=match):
        validate_release(make(preprocessing=Preprocessing(letterbox="square", **changes)), data / "two.yaml")


def test_data_of_other_classes_are_refused(make, data):
    with pytest.raises(InputError, match="has 6 classes, but the release detects 2"):
        validate_release(make(), data / "synthetic.yaml")


def test_an_unknown_engine_is_refused_with_those_that_there_are(make, data):
    with pytest.raises(InputError, match="--engine openvino: expected one of onnxruntime"):
        validate_release(make(), data / "two.yaml", "openvino")


def test_an_engine_is_named_of_a_release_only(qyolo, make, data):
    release = make()
    outcome = qyolo("validate", release.path / ENGINE, "--data", data / "two.yaml", "--engine", "openvino", "--json")
    assert outcome.code == 2 and "is no release" in outcome.json["error"]
