"""Builds whose recipe names a calibration subset."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from qyolo_deploy import pipeline
from qyolo_deploy.artifact import DigestCache, sha256_file
from qyolo_deploy.console import Reporter
from qyolo_deploy.data.calibration import read_calibration_set
from qyolo_deploy.data.synthetic import PARAMETERS_FILE, generate
from qyolo_deploy.errors import InputError, IntegrityError
from qyolo_deploy.recipe_file import load_recipe
from qyolo_deploy.stages.calibration import CalibrationChoice, create_calibration_set
from qyolo_deploy.stages.context import StageContext
from qyolo_deploy.stages.plan import Plan
from qyolo_deploy.stages.report_parts import describe_calibration


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "made"
    generate(root, seed=5, train_images=8, val_images=3, imgsz=64)
    (root / PARAMETERS_FILE).unlink()
    return root


@pytest.fixture
def product(made, tmp_path):
    """A recipe, with its data and a subset of five images beside it."""
    folder = tmp_path / "product"
    shutil.copytree(made, folder / "scenes")
    create_calibration_set(folder / "scenes", folder / "five.json", CalibrationChoice(5, imgsz=64))
    content = {
        "name": "mine",
        "model": {"weights": "builtin:quickstart", "imgsz": 64},
        "data": {"source": "scenes", "calibration": "five.json"},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return folder


def run(product, *settings):
    """The data stage alone: whether it ran, and its record."""
    result = pipeline.build(product / "mine.yaml", settings, out=product / "out", until="data")
    return result.ran, json.loads((product / "out" / "mine" / ".stages" / "data.json").read_text())


def context_of(product, *settings):
    plan = Plan(load_recipe(product / "mine.yaml", settings), product / "mine.yaml", None)
    names = ("recipe", "source", "unlabeled", "calibration", "weights", "architecture")
    known = {name: getattr(plan, name) for name in names}
    return StageContext(**known, folder=product, key="", artifacts={}, reporter=Reporter(quiet=True))


def test_the_data_stage_tells_which_subset_it_checked(product):
    subset = read_calibration_set(product / "five.json")
    ran, record = run(product)
    assert ran == ("data",)
    expected = {"name": "five", "digest": subset.digest, "images": 5, "redrawn": 0}
    assert record["info"]["calibration"] == expected
    assert record["inputs"]["calibration"] == subset.digest
    assert json.loads((product / "out" / "mine" / "dataset.json").read_text())["calibration"] == expected


def test_its_content_decides_and_not_its_format(product):
    run(product)
    file = product / "five.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content, indent=3))
    assert run(product)[0] == ()
    file.write_text(json.dumps({**content, "images": content["images"][:4]}))
    ran, record = run(product)
    assert (ran, record["info"]["calibration"]["images"]) == (("data",), 4)


def test_naming_a_subset_decides_data_and_training(product, tmp_path):
    def keys(*settings):
        plan = Plan(load_recipe(product / "mine.yaml", settings), product / "mine.yaml", None)
        digests = DigestCache(tmp_path / "digests.json")
        build = pipeline._Build(plan, tmp_path, Reporter(quiet=True), digests, None)
        return {stage.name: build._key(stage, plan.inputs(stage.name, sha256_file)) for stage in pipeline.STAGES}

    before, after = keys(), keys("data.calibration=null")
    assert {stage for stage in before if before[stage] != after[stage]} == {"data", "train"}


def test_stages_get_the_subset_in_its_order_or_all_training_data(product):
    subset = read_calibration_set(product / "five.json")
    context = context_of(product)
    found = context.calibration_data()
    assert [image.path.name for image in found.images] == [image.file_name for image in subset.images]
    training = context.training_data()
    for image, boxes in zip(found.images, found.boxes, strict=True):
        assert (boxes == training.boxes[training.images.index(image)]).all()
    assert context_of(product, "data.calibration=null").calibration_data().images == training.images


def test_a_report_tells_which_images_set_the_scales(product):
    subset = read_calibration_set(product / "five.json")
    told = describe_calibration(context_of(product, "data.calibration_images=3"))
    assert (told["images"], told["of_images"], told["imgsz"]) == (3, 5, 64)
    assert (told["name"], told["method"], told["digest"]) == (subset.name, "random", subset.digest)
    assert told["files"] == [image.file_name for image in subset.images[:3]]
    whole = replace(
        context_of(product, "data.calibration=null"),
        artifacts={"data": SimpleNamespace(info={"train": {"digest": "0" * 64}})},
    )
    told = describe_calibration(whole)
    assert (told["images"], told["of_images"], told["source"], told["digest"]) == (8, 8, "training split", "0" * 64)


def test_a_build_generates_the_scenes_that_a_subset_names(tmp_path):
    root = tmp_path / "scenes"
    generate(root, seed=3, train_images=6, val_images=2, imgsz=64)
    create_calibration_set(root, tmp_path / "part.json", CalibrationChoice(4, imgsz=64))
    recipe = tmp_path / "mine.yaml"
    synthetic = {"seed": 3, "train_images": 7, "val_images": 2}
    data = {"source": "synthetic", "synthetic": synthetic, "calibration": "part.json"}
    content = {"name": "mine", "model": {"weights": "builtin:quickstart", "imgsz": 64}, "data": data}
    recipe.write_text(yaml.safe_dump(content))
    result = pipeline.build(recipe, out=tmp_path / "out", until="data")
    record = json.loads((result.folder / ".stages" / "data.json").read_text())
    assert record["info"]["calibration"]["images"] == 4
    with pytest.raises(IntegrityError, match="the calibration subset 'part' recorded"):
        pipeline.build(recipe, ["data.synthetic.seed=4"], out=tmp_path / "other", until="data")


def test_subsets_that_do_not_fit_are_refused_before_any_training(product):
    image = product / "scenes" / "images" / "train" / read_calibration_set(product / "five.json").images[0].file_name
    whole = image.read_bytes()
    image.write_bytes(whole + b"\0")
    with pytest.raises(IntegrityError, match=image.name):
        run(product)
    image.write_bytes(whole)
    shutil.rmtree(product / "scenes" / "annotations")
    twin = Path(shutil.copy(image, product / "scenes" / "images" / "val" / "twin.jpg"))
    with pytest.raises(InputError, match=r"is the validation image .*twin\.jpg"):
        run(product)
    assert not (product / "out").exists()
    twin.unlink()
    image.unlink()
    with pytest.raises(InputError, match="is not in the training split"):
        run(product)
    with pytest.raises(InputError, match=r"data\.calibration 'none\.json' was not found; searched: "):
        run(product, "data.calibration=none.json")
    (product / "five.json").write_text("{")
    with pytest.raises(InputError, match=r"five\.json: the calibration subset is not readable JSON"):
        run(product)


def test_another_size_than_the_subset_was_chosen_for_is_said(product, capsys):
    pipeline.build(
        product / "mine.yaml", ["model.imgsz=96"], out=product / "out", until="data", reporter=Reporter(quiet=False)
    )
    assert "five.json: was chosen for 64 px, and is used at 96 px" in capsys.readouterr().err
