"""`qyolo compare` and `qyolo sensitivity`: arguments, tables and JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from qyolo_deploy.cli_output import Json, Quiet, make_table, stdout
from qyolo_deploy.console import Reporter

View = Annotated[
    str,
    typer.Argument(
        help="An .onnx, an OpenVINO folder, a .safetensors or .pt, or BUILD@float, BUILD@fake_quantized, "
        "BUILD@onnxruntime, BUILD@openvino.",
        show_default=False,
    ),
]


def compare(
    reference: View,
    compared: View,
    data: Annotated[str, typer.Option(help="Dataset YAML, its folder or a COCO JSON.")],
    images: Annotated[int, typer.Option(min=1, help="How many of its validation split.")] = 16,
    imgsz: Annotated[int | None, typer.Option(help="Longer side in pixels.")] = None,
    threshold: Annotated[
        float, typer.Option(help="SQNR in dB below which a tensor departs, where one of the views is float.")
    ] = 20.0,
    out: Annotated[Path | None, typer.Option(help="Write all numbers to this .json or .csv.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two views of a model tensor by tensor and name the first one that departs."""
    from qyolo_deploy.stages import compare as work

    if out is not None:
        work.check_format(out)
    with Reporter(quiet).progress("comparing") as tick:
        parity = work.compare(reference, compared, data, images, imgsz, threshold, progress=tick)
    if out is not None:
        work.write_parity(parity, out)
    if not quiet:
        _print(*work.parity_table(parity), work.conclusions(parity))
    if as_json:
        print(json.dumps(parity.to_json()))


def _print(head: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str]) -> None:
    table = make_table(*head)
    for row in rows:
        table.add_row(*map(escape, row))
    console = stdout()
    console.print(table)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def sensitivity(
    build: Annotated[Path, typer.Argument(help="Build folder; its float model is enough.", show_default=False)],
    data: Annotated[str, typer.Option(help="Dataset YAML, its folder or a COCO JSON.")],
    images: Annotated[int, typer.Option(min=1, help="How many of its validation split.")] = 8,
    metric: Annotated[str, typer.Option(help="Rank by sqnr, map or loss.")] = "sqnr",
    worst: Annotated[int, typer.Option(min=0, help="Print overrides of the recipe for so many.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, CSV and plot; BUILD/sensitivity.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank tensors by what the quantization of each one alone costs.

    What is measured is kept, so that the same command goes on where it was interrupted; a build with
    validate.sensitivity takes it over into its report.
    """
    from qyolo_deploy.stages import sensitivity as work
    from qyolo_deploy.stages.sensitivity_files import write_sensitivity
    from qyolo_deploy.stages.sensitivity_kept import MEASURED

    folder = out or build / work.FOLDER
    with Reporter(quiet).progress("sensitivity") as tick:
        found = work.sensitivity(build, data, images, metric, tick, folder / MEASURED)  # type: ignore[arg-type]
    files = write_sensitivity(found, folder)
    lines = work.override_lines(found, worst)
    if not quiet:
        _print(
            *work.sensitivity_table(found), [f"all {len(found.costs)} of them: {files[1]}, plot: {files[2]}", *lines]
        )
    if as_json:
        print(json.dumps({**found.to_json(), "overrides": lines, "files": [str(file) for file in files]}))
