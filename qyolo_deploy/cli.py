"""The `qyolo` command: arguments, tables, JSON and exit codes."""

import json
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qyolo_deploy import cli_bench, cli_calibration, cli_compare, cli_engine, cli_release
from qyolo_deploy._version import __version__
from qyolo_deploy.cli_output import Json, Quiet, make_table, stdout
from qyolo_deploy.console import Reporter
from qyolo_deploy.errors import GateFailedError, InputError, QyoloError

app = typer.Typer(
    name="qyolo",
    help="From float YOLO weights to low-bit engines, with the accuracy proven on the engine that ships.",
    epilog="Exit codes: 0 ok, 1 a gate failed, 2 bad input, 3 a runtime is missing, 4 integrity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
demo_app = typer.Typer(help="See in seconds what the methods do.", no_args_is_help=True)
app.add_typer(demo_app, name="demo")
app.add_typer(cli_bench.app, name="bench")
app.add_typer(cli_calibration.app, name="calibration")
app.add_typer(cli_engine.app, name="engine")
app.command()(cli_compare.compare)
app.command()(cli_compare.sensitivity)
app.command()(cli_release.selftest)
app.add_typer(cli_release.app, name="release")

Device = Annotated[str, typer.Option(help="What training computes on: auto, cpu, cuda or cuda:<index>.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: train.epochs=3", metavar="KEY=VALUE")
]


def main() -> None:
    """Runs the command and turns errors into one sentence and an exit code."""
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except QyoloError as error:
        sys.exit(_fail(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(_fail(InputError(f"{place}{error.strerror or error}")))


def _interrupt(*_: object) -> None:
    print("interrupted; the same command goes on from the last finished stage or epoch", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def _fail(error: QyoloError) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"error: {error}", style="red", markup=False)
    if error.hint:
        console.print(f"hint: {error.hint}", markup=False)
    if "--json" in sys.argv:
        print(json.dumps({"error": str(error), "hint": error.hint, "exit_code": error.exit_code}))
    return error.exit_code


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of the program itself; Typer shows its `help` and `epilog`."""


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML.")],
    settings: Settings = None,
    data: Annotated[str | None, typer.Option(help="Dataset instead of the recipe's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder under which <recipe name>/ is made.")] = Path("runs"),
    until: Annotated[str | None, typer.Option(help="Last stage to run.")] = None,
    force: Annotated[str | None, typer.Option(help="Stage to run although it is up to date.")] = None,
    device: Device = "auto",
    sign_key: cli_release.SignKey = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train, correct, export, validate and release, as far as it is not done yet."""
    from qyolo_deploy.pipeline import build as run_build

    if is_follower := os.environ.get("RANK", "0") != "0":  # one of several processes of torchrun; the first one talks
        quiet = True
    if sign_key is not None:
        cli_release.check_key(sign_key)
    result = run_build(recipe, settings or (), data, out, until, force, Reporter(quiet), device=device)
    if sign_key is not None and "release" in (*result.ran, *result.up_to_date):
        cli_release.sign_build(result.folder, sign_key)
    if not quiet:
        _print_build(result.to_json())
    if as_json and not is_follower:
        print(json.dumps(result.to_json()))
    if failed := [gate for gate in result.gates if not gate["passed"]]:
        if not as_json:
            raise GateFailedError(f"{len(failed)} of {len(result.gates)} gates failed; there is no release")
        raise typer.Exit(GateFailedError.exit_code)


def _print_build(result: dict[str, Any]) -> None:
    console = stdout()
    if not result["ran"]:
        console.print(f"{result['folder']}: everything is up to date, nothing was done", markup=False)
    if result["views"]:
        console.print(_views_table(result["views"], result["gates"], result["not_run"]))
    if failed := [gate for gate in result["gates"] if not gate["passed"]]:
        console.print(_failed_table(failed))
    for gate in failed:
        console.print(f"gate failed: {gate['reason']}", style="red", markup=False)
    report = Path(result["folder"]) / "report.html"
    if result["views"]:
        console.print(f"report: {report}", markup=False, soft_wrap=True)


def _failed_table(gates: Iterable[dict[str, Any]]) -> Table:
    """Gates that failed, and by how much."""
    table = make_table("failed gate", "view", "relative to")
    for column in ("observed", "reference", "value", "at confidence", "bound", "missed by"):
        table.add_column(column, justify="right")
    for gate in gates:
        numbers = [gate[key] for key in ("observed", "reference", "value", "at_confidence")]
        cells = ["-" if number is None else f"{number:.5g}" for number in (*numbers, gate["missed_by"])]
        cells.insert(-1, f"{gate['op']} {gate['bound']:g}")
        table.add_row(escape(gate["metric"]), gate["view"], gate["relative_to"] or "-", *cells)
    return table


def _views_table(
    views: Iterable[dict[str, Any]], gates: Iterable[dict[str, Any]] = (), not_run: Iterable[dict[str, str]] = ()
) -> Table:
    table = make_table("view")
    for column in ("mAP50-95", "mAP50", "size MB", "p50 ms", "p95 ms", "gates"):
        table.add_column(column, justify="right")
    gates = list(gates)
    for view in views:
        latency = view["latency_ms"] or {}
        own = [gate for gate in gates if gate["view"] == view["name"]]
        table.add_row(
            view["name"],
            f"{view['map50_95'] * 100:.2f}",
            f"{view['map50'] * 100:.2f}",
            "-" if view["size_bytes"] is None else f"{view['size_bytes'] / 1e6:.2f}",
            *(f"{latency[key]:.1f}" if key in latency else "-" for key in ("p50", "p95")),
            f"{sum(gate['passed'] for gate in own)}/{len(own)} passed" if own else "-",
        )
    for view in not_run:
        table.add_row(view["name"], view["status"], *"-----")
    return table


@app.command()
def matrix(
    file: Annotated[Path, typer.Argument(help="Matrix YAML: rows of methods, columns of settings.")],
    settings: Settings = None,
    data: Annotated[str | None, typer.Option(help="Dataset instead of the recipe's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder under which <matrix name>/ is made.")] = Path("runs"),
    seeds: Annotated[int | None, typer.Option(min=1, help="Builds of each cell.")] = None,
    budget: Annotated[str | None, typer.Option(help="One of the file's shorter ways through.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time, with a share of the cores each.")] = 1,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run or resume many builds of one recipe and print them as a table."""
    from qyolo_deploy.matrix.run import run_matrix
    from qyolo_deploy.matrix.table import caption, table

    with Reporter(quiet).progress("cells") as tick:
        result = run_matrix(file, data, out, seeds, budget, settings or (), jobs, device, tick)
    if not quiet:
        head, rows = table(result)
        shown = make_table(*head)
        for row in rows:
            shown.add_row(*map(escape, row))
        stdout().print(caption(result), markup=False)
        stdout().print(shown)
        stdout().print(f"cells: {result.folder / 'cells.csv'}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"folder": str(result.folder), "cells": [asdict(cell) for cell in result.cells]}))
    if result.failed and not as_json:
        first = result.failed[0]
        raise GateFailedError(f"{len(result.failed)} of {len(result.cells)} cells failed; {first.name}: {first.error}")
    if result.failed:
        raise typer.Exit(GateFailedError.exit_code)


@app.command()
def validate(
    context: typer.Context,
    engine: Annotated[
        Path, typer.Argument(help="An .onnx, .engine or .plan, an OpenVINO folder or .xml, or a release folder.")
    ],
    data: Annotated[str, typer.Option(help="Dataset YAML, its folder or a COCO JSON.")],
    view: Annotated[str | None, typer.Option("--engine", help="Of a release: view, such as openvino.")] = None,
    imgsz: Annotated[int | None, typer.Option(help="Longer side in pixels.")] = None,
    conf: Annotated[float, typer.Option(help="Scores above it count.")] = 0.001,
    iou: Annotated[float, typer.Option(help="Threshold of the non-maximum suppression.")] = 0.6,
    precision_hint: Annotated[str, typer.Option(help="OpenVINO: f32 or bf16.")] = "f32",
    evaluator: Annotated[
        Literal["faster", "pycocotools"], typer.Option(help="faster-coco-eval, or the reference: the same figures.")
    ] = "faster",
    latency_runs: Annotated[int, typer.Option(min=1, help="Timed inferences of one image, for latencies.")] = 10,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure COCO mAP and latency of any engine file, or of an engine of a release as its manifest says."""
    if cli_release.is_release(engine):
        cli_release.validate(context, engine, data, view, latency_runs, as_json, quiet)
        return
    if view is not None:
        raise InputError(f"--engine {view}: {engine} is no release, expected a folder with a manifest.json")
    from qyolo_deploy.validate.run import validate as run_validate

    with Reporter(quiet).progress(f"validating {engine.name}") as tick:
        report = run_validate(
            engine,
            data,
            imgsz,
            conf,
            iou,
            precision_hint=precision_hint,
            evaluator=evaluator,
            latency_runs=latency_runs,
            progress=tick,
        ).to_json()
    if not quiet:
        stdout().print(_views_table([report]))
    if as_json:
        print(json.dumps(report))


@app.command()
def verify(
    release: Annotated[Path, typer.Argument(help="Release folder, with its manifest.json, or a packed .tar.zst.")],
    key: Annotated[Path | None, typer.Option(help="Public key (PEM) whose holder must have signed it.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove that a release is whole and unchanged, and with a key who released it."""
    verified = cli_release.verify_any(release, key)
    facts = {
        "release": str(verified.path),
        "name": verified.manifest.name,
        "version": verified.manifest.version,
        "files": len(verified.files),
        "size_bytes": verified.size_bytes,
        "digest": verified.digest,
        "signature": verified.signature,
    }
    if not quiet:
        text = f"{facts['name']} {facts['version']}: {facts['files']} files as released, digest {facts['digest']}"
        text += f", signature: {verified.signature}"
        stdout().print(text, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(facts))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show runtimes, versions and devices, what is missing and how to get it."""
    from qyolo_deploy.doctor import check_runtimes

    findings = check_runtimes()
    table = make_table("component", "status", "version", "details", "how to get it", "needed for")
    for found in findings:
        color = "green" if found.status == "ok" else "yellow"
        cells = (found.version, found.details, found.remedy, found.needed_for)
        table.add_row(found.component, f"[{color}]{found.status}[/]", *map(escape, cells))
    stdout().print(table)
    if as_json:
        print(json.dumps({"findings": [asdict(found) for found in findings]}))


@recipe_app.command("show")
def recipe_show(recipe: Annotated[Path, typer.Argument(help="Recipe YAML.")], settings: Settings = None) -> None:
    """Print a recipe with all defaults filled in."""
    from qyolo_deploy.recipe_file import load_recipe

    print(load_recipe(recipe, settings or ()).to_yaml(), end="")


@recipe_app.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from qyolo_deploy.recipe_file import recipe_schema as schema

    print(json.dumps(schema(), indent=1))


@recipe_app.command("list")
def recipe_list(folder: Annotated[Path, typer.Argument(help="Folder of recipes.")] = Path("recipes")) -> None:
    """List the recipes of a folder."""
    from qyolo_deploy.recipe_file import load_recipe

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of recipes")
    table = make_table("recipe", "model", "bits", "targets", "description")
    for path in sorted(folder.glob("*.yaml")):
        recipe = load_recipe(path)
        model = recipe.model.weights or str(recipe.model.architecture)
        table.add_row(
            escape(str(path)),
            escape(model),
            recipe.quantization.scheme().label,
            ", ".join(recipe.export.targets),
            escape(recipe.description),
        )
    stdout().print(table)


@demo_app.command("oscillation")
def demo_oscillation(
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("oscillation.html"),
    seed: Annotated[int, typer.Option(min=0, help="Of the simulated inputs.")] = 0,
    as_json: Json = False,
) -> None:
    """Show on toy regressions why quantized weights oscillate, and what an EMA does about it."""
    from qyolo_deploy.stages.demo import error_table, frequency_table, run_oscillation

    numbers = run_oscillation(out, seed)
    for head, rows in (frequency_table(numbers), error_table(numbers)):
        table = make_table(*head)
        for row in rows:
            table.add_row(*row)
        stdout().print(table)
    stdout().print(f"page: {out}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"page": str(out), **numbers}))
