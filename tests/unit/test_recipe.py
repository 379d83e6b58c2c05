import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qyolo_deploy.errors import InputError
from qyolo_deploy.quant.spec import LayerScheme
from qyolo_deploy.recipe import Recipe
from qyolo_deploy.recipe_file import load_recipe, recipe_schema

SMALL = {"name": "small", "model": {"weights": "model.pt"}, "data": {"source": "data.yaml"}}
SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Writes a recipe, given as data or as text, and returns its path."""

    def write(content, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def refusal(path, *overrides):
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence.removeprefix(str(path))) < 400
    return sentence


# --- shipped recipes and defaults ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_under_their_file_name(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description
    assert set(recipe.export.targets) == {"onnxruntime", "openvino"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_resolved_recipe_gives_the_same_recipe_again(path, write):
    recipe = load_recipe(path, ["train.lr=1e-5", "quantization.keep_float=['model.22.*']"])
    assert load_recipe(write(recipe.to_yaml())) == recipe


def test_the_quickstart_is_what_the_readme_promises():
    recipe = load_recipe(next(path for path in SHIPPED if path.stem == "quickstart"))
    scheme = recipe.quantization.scheme()
    assert scheme.label == "w4a4"
    assert scheme.first_last_bits == 8
    assert recipe.data.source == "synthetic"
    assert recipe.model.weights == "builtin:quickstart"


def test_defaults_follow_the_conventions_of_validation(write):
    recipe = load_recipe(write(SMALL))
    assert (recipe.validate_.conf, recipe.validate_.iou, recipe.validate_.max_det) == (0.001, 0.6, 300)
    assert recipe.validate_.letterbox == "rect"
    assert recipe.model.imgsz == 640
    assert recipe.float.epochs == 0
    assert recipe.export.storage_of("onnxruntime") == "int8"
    assert recipe.release.license == "AGPL-3.0-or-later"


def test_sections_become_the_scheme_that_places_quantizers(write):
    overrides = {"model.22.*": {"weights": 8}, "model.0": {"weights": 6}}
    quantization = {"weights": {"bits": 3, "granularity": "per_channel"}, "overrides": overrides, "keep_float": ["*.9"]}
    scheme = load_recipe(write({**SMALL, "quantization": quantization})).quantization.scheme()
    assert (scheme.weights.bits, scheme.weights.axis, scheme.weights.signed) == (3, 0, True)
    assert (scheme.activations.bits, scheme.activations.axis, scheme.activations.signed) == (8, None, False)
    assert scheme.overrides == {"model.22.*": LayerScheme(8, 8), "model.0": LayerScheme(6, 8)}
    assert scheme.keep_float == ("*.9",)


def test_a_target_may_have_a_storage_of_its_own(write):
    def found(storage):
        export = load_recipe(write({**SMALL, "export": {"storage": storage}})).export
        return [export.storage_of(target) for target in ("onnxruntime", "openvino", "tensorrt")]

    assert found("int4") == ["int4", "int4", "int8"]
    assert found({"onnxruntime": "int2"}) == ["int2", "int8", "int8"]


@pytest.mark.parametrize(
    ("grid", "signed", "offset"), [("asymmetric", False, True), ("unsigned", False, False), ("symmetric", True, True)]
)
def test_a_grid_s_name_tells_its_levels_and_its_offset(write, grid, signed, offset):
    scheme = load_recipe(write({**SMALL, "quantization": {"activations": {"grid": grid}}})).quantization.scheme()
    assert (scheme.activations.signed, scheme.offset) == (signed, offset)


def test_recipes_are_read_without_torch(write):
    code = "import sys; from pathlib import Path; from qyolo_deploy import load_recipe; load_recipe(Path(sys.argv[1]))"
    code += "; print(sorted({'torch', 'ultralytics', 'onnx', 'cv2'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, str(write(SMALL))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- extends ------------------------------------------------------------------------------------------------


def test_extends_merges_sections_and_replaces_values(write):
    gate = {"view": "onnxruntime", "metric": "map50_95", "op": ">=", "bound": 0.1}
    base = {**SMALL, "train": {"epochs": 9, "loss": {"labels": 1.0}}, "gates": [gate, gate]}
    write(base, "base.yaml")
    middle = {"extends": "base.yaml", "train": {"batch": 4}, "quantization": {"overrides": {"a": {"weights": 5}}}}
    write(middle, "middle.yaml")
    leaf = {"extends": "middle.yaml", "name": "leaf", "train": {"epochs": 2, "loss": {"logits": 0}}, "gates": []}
    recipe = load_recipe(write({**leaf, "quantization": {"overrides": {"b": {"weights": 6}}}}, "leaf.yaml"))
    assert recipe.name == "leaf"
    assert (recipe.train.epochs, recipe.train.batch) == (2, 4)
    assert (recipe.train.loss.labels, recipe.train.loss.logits) == (1.0, 0.0)
    assert recipe.gates == ()
    assert {glob: entry.weights for glob, entry in recipe.quantization.overrides.items()} == {"a": 5, "b": 6}


def test_extends_is_looked_for_beside_its_recipe(write, tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    write(SMALL, "parts/base.yaml")
    path = write({"extends": "parts/base.yaml", "name": "other"})
    monkeypatch.chdir("/")
    assert load_recipe(path).data.source == "data.yaml"


def test_null_takes_back_what_a_base_set(write):
    write({**SMALL, "model": {"weights": "model.pt", "architecture": "yolo11n"}}, "base.yaml")
    recipe = load_recipe(write({"extends": "base.yaml", "model": {"weights": None}}))
    assert (recipe.model.weights, recipe.model.architecture) == (None, "yolo11n")


@pytest.mark.parametrize("chain", [["a", "a"], ["a", "b", "a"]])
def test_a_recipe_that_extends_itself_is_refused(chain, write):
    for name, base in pairwise(chain):
        write({"extends": f"{base}.yaml"}, f"{name}.yaml")
    assert "a.yaml: extends itself" in refusal(write({"extends": f"{chain[1]}.yaml"}, "a.yaml"))


def test_a_missing_base_and_a_wrong_one_are_named(write, tmp_path):
    assert refusal(write({**SMALL, "extends": "none.yaml"})) == f"{tmp_path / 'none.yaml'}: no such recipe"
    assert "extends: expected the name of one recipe file" in refusal(write({**SMALL, "extends": ["a.yaml"]}))


# --- settings -----------------------------------------------------------------------------------------------


def test_settings_reach_nested_keys_and_are_read_as_yaml(write):
    path = write(SMALL)
    overrides = [
        "train.loss.labels=0.5",
        "train.lr=1e-3",
        "train.images=null",
        "export.targets=[openvino]",
        "validate.rect=false",
        "description=a = b",
        'quantization.overrides={"model.2[0-9].*": {weights: 6}}',
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.train.loss.labels == 0.5
    assert recipe.train.lr == 0.001
    assert recipe.train.images is None
    assert recipe.export.targets == ("openvino",)
    assert recipe.validate_.rect is False
    assert recipe.description == "a = b"
    assert recipe.quantization.overrides["model.2[0-9].*"].weights == 6


def test_the_last_setting_wins_over_the_file_and_over_earlier_ones(write):
    path = write({**SMALL, "train": {"epochs": 1, "batch": 2}})
    train = load_recipe(path, ["train.epochs=5", "train.epochs=7"]).train
    assert (train.epochs, train.batch) == (7, 2)


def test_a_setting_of_one_section_leaves_its_yaml_alias_alone(write):
    loss = "loss: &parts {labels: 0.25}"
    alias = f"{yaml.safe_dump(SMALL)}train: {{{loss}}}\ncorrect: {{loss: *parts}}\n"
    recipe = load_recipe(write(alias), ["train.loss.labels=0.75"])
    assert (recipe.train.loss.labels, recipe.correct.loss.labels) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.epochs", "--set train.epochs: expected key.path=value"),
        ("=3", "--set =3: expected key.path=value"),
        ("train..epochs=3", "--set train..epochs=3: expected key.path=value"),
        ("train.epochs=[1", "--set train.epochs=[1: the value is not valid YAML"),
        ("model.weights.bits=3", "'weights' is a value, not a section"),
        ("trian.epochs=3", "--set trian.epochs: trian: unknown key, expected one of name, description, model, data"),
        ("train.epoch=3", "--set train.epoch: unknown key, expected one of epochs, batch, lr"),
        ("train.epochs=many", "--set train.epochs: Input should be a valid integer"),
        ("train.lr=.inf", "--set train.lr: Input should be a finite number, found inf"),
        ("train=5", "--set train: expected a mapping of keys, found 5"),
        ("export.targets=openvino", "--set export.targets: expected a list, found 'openvino'"),
        ("quantization={weights: {bits: 9}}", "--set quantization: quantization.weights.bits: Input should be less"),
        ("quantization.weights.bits=1", "--set quantization.weights.bits: Input should be greater than or equal to 2"),
        ("extends=other.yaml", "--set extends: unknown key"),
        ("export.storage=int5", "--set export.storage: Input should be 'int8', 'int4' or 'int2', found 'int5'"),
        (
            "export.storage.openvino=5",
            "--set export.storage.openvino: Input should be 'int8', 'int4' or 'int2', found 5",
        ),
    ],
)
def test_settings_that_cannot_be_applied_are_named(setting, words, write):
    assert words in refusal(write(SMALL), setting)


# --- bad recipes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trian": {}}, "trian: unknown key, expected one of name"),
        (
            {"train": {"loss": {"label": 1}}},
            "train.loss.label: unknown key, expected one of labels, logits",
        ),
        ({"train": None}, "train: expected a mapping of keys, found None"),
        ({"train": {"epochs": "three"}}, "train.epochs: Input should be a valid integer"),
        ({"train": {"loss": {"logits": 0, "detections": 0}}}, "train.loss: expected a positive weight for labels"),
        ({"train": {"rounding": {"start": 0.8, "end": 0.8}}}, "train.rounding: end: expected more than start, 0.8"),
        ({"train": {"rounding": {"lr": 0}}}, "train.rounding.lr: Input should be greater than 0, found 0"),
        ({"train": {"rounding": {}, "freezing": {}}}, "train: rounding: expected no freezing beside it"),
        ({"train": {"rounding": {"start": 0.1}, "backbone_first": 0.2}}, "rounding.start: expected at least backbone_"),
        ({"name": "../up"}, "name: String should match pattern"),
        ({"name": 3}, "name: Input should be a valid string, found 3"),
        ({"model": {}}, "model: expected weights or architecture"),
        ({"model": {"weights": "a.pt", "imgsz": 100}}, "model.imgsz: Input should be a multiple of 32, found 100"),
        ({"data": {}}, "data.source: required key is missing"),
        ({"export": {"targets": []}}, "export.targets: Tuple should have at least 1 item"),
        ({"export": {"dynamic": False}}, "validate.rect needs export.dynamic"),
        ({"quantization": {"overrides": {"model.*": {"weights": 9}}}}, "quantization.overrides.model.*.weights: Input"),
        ({"validate": {"conf": 1.5}}, "validate.conf: Input should be less than or equal to 1, found 1.5"),
    ],
)
def test_one_sentence_names_file_key_and_expectation(change, words, write):
    path = write({**SMALL, **change})
    sentence = refusal(path)
    assert sentence.startswith(f"{path}: ") and words in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"view": "tensorrt"}, "gates.0.view: expected one of float, fake_quantized, onnxruntime, openvino"),
        ({"relative_to": "int8"}, "gates.0.relative_to: expected one of float"),
        ({"relative_to": "onnxruntime"}, "relative_to is 'onnxruntime', the view itself"),
        ({"mode": "ratio"}, "mode ratio needs relative_to"),
        ({"relative_to": "release"}, "gates.0.relative_to: release needs validate.last_release"),
        ({"confidence": 2}, "gates.0.confidence: Input should be less than 1"),
        ({"metric": "size_bytes", "confidence": 0.9}, "confidence is for map50_95"),
        ({"op": "=="}, "gates.0.op: Input should be '>=', '<=', '>' or '<', found '=='"),
        ({"bound": float("nan")}, "gates.0.bound: Input should be a finite number"),
        ({"bond": 1}, "gates.0.bond: unknown key"),
        ({"view": "soft_rounded"}, "gates.0.view: expected one of float, fake_quantized, onnxruntime, openvino"),
        ({"at": "device"}, "at device needs the view tensorrt"),
        ({"view": "tensorrt", "at": "device", "confidence": 0.9}, "at device takes neither confidence"),
    ],
)
def test_gates_that_could_never_be_checked_are_refused_before_any_work(change, words, write):
    gate = {"view": "onnxruntime", "metric": "map50_95", "op": ">=", "bound": 0.1}
    assert load_recipe(write({**SMALL, "gates": [gate]})).gates[0].bound == 0.1
    assert words in refusal(write({**SMALL, "gates": [{**gate, **change}]}))


def test_soft_rounding_is_a_view_of_what_training_left(write):
    gate = {"view": "soft_rounded", "metric": "map50_95", "op": ">=", "bound": 0.1}
    changes = {"validate": {"soft_rounding": True}, "gates": [gate]}
    recipe = load_recipe(write({**SMALL, **changes, "correct": {"enabled": False}}))
    assert recipe.views == ("float", "fake_quantized", "soft_rounded", "onnxruntime", "openvino")
    assert "validate.soft_rounding: expected correct.enabled: false" in refusal(write({**SMALL, **changes}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "expected a mapping of keys, found list"),
        ("", "expected a mapping of keys, found NoneType"),
        ("name: [", "not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipe_are_refused(text, words, write):
    assert words in refusal(write(text))


def test_recipes_that_cannot_be_read_are_named(tmp_path):
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such recipe"
    assert str(tmp_path) in refusal(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: cannot be read" in refusal(binary)


def test_several_mistakes_are_counted(write):
    assert refusal(write({**SMALL, "a": 1, "b": 2, "c": 3})).endswith("(and 2 more)")


def test_recipes_do_not_change(write):
    recipe = load_recipe(write(SMALL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"


VALUES = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", "a: b", "[", "é"]) | st.just([[]])


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)), VALUES))
def test_whatever_a_section_holds_instead_is_refused_with_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": 3, **content}), encoding="utf-8")
    assert str(path) in refusal(path)


# --- schema -------------------------------------------------------------------------------------------------


def objects(schema):
    """All parts of a schema that describe a section."""
    return [part for part in (schema, *schema["$defs"].values()) if part.get("type") == "object"]


def test_the_schema_closes_every_section_and_names_every_key():
    schema = recipe_schema()
    assert all(part["additionalProperties"] is False for part in objects(schema))
    aliases = {info.alias or name for name, info in Recipe.model_fields.items()}
    assert set(schema["properties"]) == aliases | {"extends"}
    assert json.loads(json.dumps(schema)) == schema


def test_every_reference_of_the_schema_leads_somewhere():
    schema = recipe_schema()
    text = json.dumps(schema)
    found = {part.partition('"')[0] for part in text.split('"$ref": "')[1:]}
    assert found == {f"#/$defs/{name}" for name in schema["$defs"]}


def test_the_schema_judges_recipes_as_loading_does(write):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    accepts = jsonschema.Draft202012Validator(schema).is_valid
    for path in SHIPPED:
        assert accepts(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert accepts(json.loads(json.dumps(load_recipe(path).to_dict())))
    assert accepts(SMALL)
    assert accepts({"extends": "base.yaml"})
    wrong = [
        {"trian": {}},
        {"train": {"epoch": 3}},
        {"train": {"epochs": -1}},
        {"model": {"imgsz": 100}},
        {"name": "../up"},
        {"data": {}},
        {"gates": [{"view": "float"}]},
        {"export": {"targets": []}},
    ]
    for change in wrong:
        refusal(write({**SMALL, **change}))
        assert not accepts({**SMALL, **change}), change
    assert not accepts({"name": "small"})
