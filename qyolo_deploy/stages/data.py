"""Stage `data`: generated scenes, or a check of the dataset that the recipe names."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.data.calibration import read_calibration_set
from qyolo_deploy.data.calibration_check import check_calibration_set
from qyolo_deploy.data.dataset import check_images, digest_dataset, load_dataset
from qyolo_deploy.data.synthetic import PARAMETERS_FILE, generate
from qyolo_deploy.errors import InputError
from qyolo_deploy.stages.context import StageContext, StageOutput

SPLITS = ("train", "val")


def run(context: StageContext) -> StageOutput:
    """Generates or checks the data, so that no later stage meets a corrupt image."""
    recipe, folder = context.recipe, context.folder / "data"
    files = []
    if context.source is None:
        settings = recipe.data.synthetic
        _discard(folder)
        with context.reporter.progress("generating scenes") as tick:
            generate(
                folder,
                seed=settings.seed,
                train_images=settings.train_images,
                val_images=settings.val_images,
                imgsz=recipe.model.imgsz,
                progress=tick,
            )
        files = [path for path in folder.rglob("*") if path.is_file()]
    info: dict[str, object] = {}
    for split in SPLITS:
        dataset = load_dataset(context.dataset, split)
        if split == "val" and not any(map(len, dataset.boxes)):
            raise InputError(f"{dataset.source}: no image of the split '{split}' has an annotated object")
        with context.reporter.progress(f"checking {split} images") as tick:
            check_images(dataset, tick)
        info[split] = {"images": len(dataset), "digest": digest_dataset(dataset)}
        info["names"] = list(dataset.class_names)
    if context.unlabeled is not None:
        extra = context.training_data()
        with context.reporter.progress("checking unlabelled images") as tick:
            check_images(replace(extra, images=extra.images[extra.labeled :]), tick)
        info["unlabeled"] = {"images": len(extra) - (extra.labeled or 0)}
    if context.calibration is not None:
        info["calibration"] = _check_calibration(context, context.calibration)
    # What later stages depend on is the artifact's files, and a dataset elsewhere is none of them.
    record = context.folder / "dataset.json"
    write_atomic(record, json.dumps(info, indent=1))
    return StageOutput("dataset", [*files, record], info)


def _check_calibration(context: StageContext, path: Path) -> dict[str, object]:
    """What is told of the calibration subset, once its images are known to be the recorded ones."""
    calibration = read_calibration_set(path)
    training, validation = (load_dataset(context.dataset, split) for split in SPLITS)
    with context.reporter.progress("checking the calibration subset") as tick:
        selection = check_calibration_set(calibration, training, validation, tick)
    chosen_px, used_px = calibration.preprocessing.imgsz, context.recipe.model.imgsz
    if chosen_px != used_px:
        context.reporter.note(f"  {path}: was chosen for {chosen_px} px, and is used at {used_px} px")
    return {
        "name": calibration.name,
        "digest": calibration.digest,
        "images": len(calibration.images),
        "redrawn": selection.redrawn,
    }


def _discard(folder: Path) -> None:
    """Takes older scenes out of the way in one step, under a name that the next build sweeps away after a kill."""
    if (folder / PARAMETERS_FILE).is_file():
        aside = folder.with_name(f".{folder.name}.old.partial")
        folder.rename(aside)
        shutil.rmtree(aside)
