"""`qyolo calibration`: arguments, tables and JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from qyolo_deploy.cli_output import Json, Quiet, make_table, stdout
from qyolo_deploy.console import Reporter

app = typer.Typer(help="Choose, verify and show calibration subsets.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="Calibration subset, a JSON file.")]


@app.command()
def create(
    data: Annotated[str, typer.Argument(help="Dataset YAML or its folder, with the splits train and val.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    images: Annotated[int, typer.Option(help="How many images of the training split.")],
    method: Annotated[str, typer.Option(help="random, balanced (classes) or coverage (of activations).")] = "random",
    seed: Annotated[int, typer.Option(help="Of the random order, which also decides between equals.")] = 0,
    imgsz: Annotated[int, typer.Option(help="Side in pixels of the square that the network sees.")] = 640,
    weights: Annotated[str | None, typer.Option(help="Coverage: checkpoint of the float model.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the subset; by default that of its file.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Name of the data set; by default that of DATA.")] = None,
    origin: Annotated[str | None, typer.Option(help="Where the images can be had.")] = None,
    image_license: Annotated[str | None, typer.Option("--license", help="Terms of the images.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose training images for calibration and write down which."""
    from qyolo_deploy.stages.calibration import CalibrationChoice, create_calibration_set

    choice = CalibrationChoice(images, method, seed, imgsz, weights, name, dataset, origin, image_license)
    facts = {"file": str(out), **create_calibration_set(data, out, choice, Reporter(quiet)).summary()}
    if not quiet:
        text = f"{out}: {facts['images']} images, {method}, digest {facts['digest']}"
        stdout().print(text, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(facts))


@app.command()
def verify(
    file: File,
    data: Annotated[str, typer.Option(help="Dataset YAML or its folder, with the splits train and val.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove that all images are there and unchanged, and that none is a validation image."""
    from qyolo_deploy.stages.calibration import verify_calibration_set

    calibration, selection = verify_calibration_set(file, data, Reporter(quiet))
    facts = {"file": str(file), **calibration.summary(), "data": data, "redrawn": selection.redrawn}
    if not quiet:
        same = f"{facts['images'] - selection.redrawn} images as recorded"
        redrawn = f", {selection.redrawn} generated again with other bytes" if selection.redrawn else ""
        text = f"{facts['name']}: {same}{redrawn}, none in the validation split, digest {facts['digest']}"
        stdout().print(text, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(facts))


@app.command()
def show(
    file: File,
    data: Annotated[str | None, typer.Option(help="Dataset whose objects are counted by class.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show how a subset was chosen, from what, and with the data its objects by class."""
    from qyolo_deploy.data.calibration import read_calibration_set
    from qyolo_deploy.stages.calibration import count_classes

    calibration = read_calibration_set(file)
    facts = {"file": str(file), **calibration.summary()}
    if data is not None:
        facts["classes"] = count_classes(calibration, data)
    if not quiet:
        _print_subset(facts)
    if as_json:
        print(json.dumps(facts))


def _print_subset(facts: dict[str, Any]) -> None:
    table = make_table("key", "value")
    for key, value in _flat({key: facts[key] for key in facts if key != "classes"}):
        table.add_row(key, escape(value))
    stdout().print(table)
    if "classes" in facts:
        counts = make_table("class")
        for column in ("images", "objects"):
            counts.add_column(column, justify="right")
        for row in facts["classes"]:
            counts.add_row(escape(row["name"]), str(row["images"]), str(row["objects"]))
        stdout().print(counts)


def _flat(facts: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """All that is told, with the path of its key."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        elif value is not None:
            yield f"{above}{key}", str(value)
