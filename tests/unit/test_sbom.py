"""The bill of materials, held against the library's own validator of CycloneDX 1.6 and against pyproject.toml."""

import importlib.metadata
import json
import re
import tomllib

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from helpers.releases import make_info

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.release.sbom import BUILDING, RUNNING, sbom_text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("sbom") / "model.safetensors"
    file.write_bytes(bytes(40))
    return file


@pytest.fixture(scope="module")
def text(model):
    return sbom_text(make_info("0" * 64), {"model.safetensors": model})


@pytest.fixture(scope="module")
def parts(text):
    return {part["bom-ref"]: part for part in json.loads(text)["components"]}


def test_it_follows_the_schema(text):
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_it_says_the_same_again_and_nothing_random(text, model):
    assert sbom_text(make_info("0" * 64), {"model.safetensors": model}) == text
    assert "timestamp" not in text
    other = sbom_text(make_info("0" * 64, version="1.0.1"), {"model.safetensors": model})
    assert json.loads(other)["serialNumber"] != json.loads(text)["serialNumber"]


def test_it_names_model_engines_and_data_with_their_digests(text, model, parts):
    component = json.loads(text)["metadata"]["component"]
    assert (component["type"], component["name"], component["version"]) == ("machine-learning-model", "toy", "1.0.0")
    assert component["hashes"] == [{"alg": "SHA-256", "content": sha256_file(model)}]
    assert component["licenses"] == [{"license": {"id": "AGPL-3.0-or-later"}}]
    assert parts["engine:onnxruntime"]["hashes"] == [{"alg": "SHA-256", "content": "e" * 64}]
    assert parts["data:val"]["properties"] == [{"name": "qyolo:digest", "value": "c" * 64}]


def test_it_names_libraries_with_versions_and_licences(text, parts):
    for name in ("onnxruntime", "numpy"):
        library = parts[f"pypi:{name}"]
        version = importlib.metadata.version(name)
        assert (library["version"], library["purl"]) == (version, f"pkg:pypi/{name}@{version}")
        assert library["licenses"] and library["scope"] == "required"
    assert parts["pypi:torch"]["scope"] == "excluded"
    needs = {entry["ref"]: entry.get("dependsOn", []) for entry in json.loads(text)["dependencies"]}
    assert needs["engine:onnxruntime"] == ["pypi:onnxruntime"]
    assert set(needs["model"]) == {"engine:onnxruntime", "data:val"}


def test_it_knows_every_library_that_the_package_asks_for(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = lambda lines: {re.match(r"[\w.-]+", line)[0] for line in lines}  # noqa: E731
    assert names(project["dependencies"]) | names(extras["openvino"]) == set(RUNNING)
    assert names(extras["build"]) - set(RUNNING) == set(BUILDING)
