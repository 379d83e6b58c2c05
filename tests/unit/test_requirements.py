import importlib.metadata

import pytest

from qyolo_deploy.engines.requirements import MINIMUM, check_targets, minimum_version, version_numbers
from qyolo_deploy.errors import RuntimeMissingError
from qyolo_deploy.pipeline import build


@pytest.fixture
def pretend(monkeypatch):
    """Function from a version, or None for no installation, to a machine on which OpenVINO, or another, is that."""
    real = importlib.metadata.version

    def pretend(found, package="openvino"):
        def version(name):
            if name != package:
                return real(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "openvino is not installed"),
        ("2025.4.0", r"openvino 2025\.4\.0 is too old, expected 2026\.0"),
    ],
)
def test_a_build_whose_engines_could_not_be_made_is_refused_before_any_work(
    pretend, found, message, repository, tmp_path
):
    pretend(found)
    with pytest.raises(RuntimeMissingError, match=message) as caught:
        build(repository / "recipes" / "quickstart.yaml", out=tmp_path / "out")
    assert "leave openvino out of export.targets" in caught.value.hint
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("found", ["2026.0", "2026.4.1", "2027.0.0.dev1"])
def test_what_is_new_enough_is_taken(pretend, found):
    pretend(found)
    check_targets({"onnxruntime": "int8", "openvino": "int8"})


def test_other_targets_need_no_openvino(pretend):
    pretend(None)
    check_targets({"onnxruntime": "int8"})


def test_weights_of_2_bits_need_an_onnx_runtime_that_knows_them(pretend, repository, tmp_path):
    pretend("1.23.2", "onnxruntime")
    check_targets({"onnxruntime": "int4", "openvino": "int4"})
    check_targets({"onnxruntime": "int8", "openvino": "int2"})
    with pytest.raises(RuntimeMissingError, match=r"onnxruntime 1\.23\.2 does not load int2, expected 1\.24") as caught:
        build(repository / "recipes" / "quickstart.yaml", ["export.storage=int2"], out=tmp_path / "out")
    assert caught.value.hint == 'pip install "onnxruntime>=1.24", or take a wider export.storage.'
    assert caught.value.exit_code == 3 and not (tmp_path / "out").exists()
    pretend("1.24.0", "onnxruntime")
    check_targets({"onnxruntime": "int2", "openvino": "int2"})
    assert [minimum_version("onnxruntime", storage) for storage in ("int8", "int2")] == ["1.23", "1.24"]


@pytest.mark.parametrize(
    ("older", "newer"), [("1.9", "1.23"), ("1.22.1", "1.23"), ("1.23", "1.23.0"), ("2025.4", MINIMUM["openvino"])]
)
def test_versions_are_compared_by_number(older, newer):
    assert version_numbers(older) < version_numbers(newer)
    assert version_numbers(f"{newer}+cpu") == version_numbers(newer)
