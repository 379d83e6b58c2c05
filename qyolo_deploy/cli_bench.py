"""`qyolo bench`: arguments, tables and JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from qyolo_deploy.cli_output import Json, Quiet, make_table, stdout
from qyolo_deploy.console import Reporter
from qyolo_deploy.errors import InputError

if TYPE_CHECKING:
    from qyolo_deploy.stages.bench_engines_subjects import Subject

app = typer.Typer(help="Measure speed and memory of what takes long, and of engines.", no_args_is_help=True)


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Architecture (random weights), model YAML or checkpoint.")] = "yolov8n",
    imgsz: Annotated[int, typer.Option(help="Side of the random images in pixels.")] = 256,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps of each training in a round.")] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds, in which each training gets its turn.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Of torch; by default its own choice.")] = None,
    weight_bits: Annotated[int, typer.Option(help="Of the quantization-aware training.")] = 4,
    activation_bits: Annotated[int, typer.Option(help="Of the quantization-aware training.")] = 4,
    seed: Annotated[int, typer.Option(help="Of weights, images and labels.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare training steps: float, quantization-aware, and ultralytics' own int8 where nvidia-modelopt is there."""
    from qyolo_deploy.stages.bench_train import bench_table, run_bench
    from qyolo_deploy.stages.bench_trainee import BenchSettings

    settings = BenchSettings(model, imgsz, batch, steps, rounds, threads, weight_bits, activation_bits, seed)
    with Reporter(quiet).progress("training steps") as tick:
        result = run_bench(settings, tick)
    if not quiet:
        _print_table(*bench_table(result))
    if as_json:
        print(json.dumps(result))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = make_table(*head)
    for row in rows:
        table.add_row(*map(escape, row))
    stdout().print(table)


@app.command()
def engines(
    engines: Annotated[
        list[str] | None,
        typer.Argument(help="Engine files, TensorRT's too; an OpenVINO folder may be followed by @bf16."),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Engine or row to compare with; by default the first.")] = None,
    imgsz: Annotated[int, typer.Option(help="Side of the image in pixels.")] = 640,
    rounds: Annotated[int, typer.Option(help="Rounds, in which each engine gets its turn.")] = 9,
    runs: Annotated[int, typer.Option(help="Inferences of a turn.")] = 10,
    threads: Annotated[int | None, typer.Option(help="Of each engine; by default its runtime's choice.")] = None,
    conf: Annotated[float, typer.Option(help="Of raw head maps, candidates with a score above it are decoded.")] = 0.25,
    batch: Annotated[int, typer.Option(help="Images of an inference.")] = 1,
    mode: Annotated[
        Literal["latency", "throughput"], typer.Option(help="One inference at a time, or as many as the cores take.")
    ] = "latency",
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory, in processes of their own.")] = False,
    precision_hint: Annotated[
        list[str] | None, typer.Option(help="Of OpenVINO: f32 (default), bf16 or f16; each one given makes a row.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Measure what others make of --weights as well.")] = False,
    schemes: Annotated[
        str | None, typer.Option(help="Measure ours of --weights without training as well: w8a8,w4a8")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Checkpoint, or architecture (random weights).")] = None,
    data: Annotated[
        str | None, typer.Option(help="Dataset: its training split calibrates, engines look at an image of val.")
    ] = None,
    calibration_images: Annotated[int, typer.Option(help="How many images of it.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder that keeps what is made of --weights.")] = Path("runs/bench"),
    profile: Annotated[bool, typer.Option("--profile", help="Show the kernels that run, and their times.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare latency, load time and size of engines, in rounds in which each gets its turn."""
    from qyolo_deploy.data.dataset import find_input, load_dataset
    from qyolo_deploy.stages.bench_engines import bench_table, caption, profile_table, run_bench
    from qyolo_deploy.stages.bench_engines_own import parse_schemes
    from qyolo_deploy.stages.bench_engines_subjects import BenchEnginesSettings, parse_engines

    settings = BenchEnginesSettings(imgsz, rounds, runs, threads, conf, batch, mode, memory)
    hints = precision_hint or ["f32"]
    subjects = parse_engines(engines or (), hints, baseline)
    wanted, reporter = parse_schemes(schemes or ""), Reporter(quiet)
    if wanted or peers:
        if weights is None or data is None:
            raise InputError("--peers and --schemes need --weights and --data")
        subjects += _made(weights, data, imgsz, calibration_images, out, wanted, peers, hints, reporter)
    image = None if data is None else load_dataset(find_input(data), "val").images[0].path
    with reporter.progress("inferences in turn") as tick:
        result = run_bench(subjects, settings, baseline, tick, image)
    if not quiet:
        stdout().print(caption(result), markup=False, soft_wrap=True)
        _print_table(*bench_table(result))
    if profile and not quiet:
        _print_table(*profile_table(subjects, settings))
    if as_json:
        print(json.dumps(result))


@app.command()
def validate(
    engine: Annotated[Path, typer.Argument(help="An .onnx, an OpenVINO folder or .xml.")],
    data: Annotated[str, typer.Option(help="Dataset YAML, its folder or a COCO JSON.")],
    imgsz: Annotated[int | None, typer.Option(help="Longer side in pixels.")] = None,
    images: Annotated[int, typer.Option(help="The first so many; all are held in memory as tensors.")] = 200,
    rounds: Annotated[int, typer.Option(help="Rounds, in which each gets its turn.")] = 3,
    ultralytics: Annotated[bool, typer.Option("--ultralytics", help="Let YOLO(engine).val() take part.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the time of a whole validation with that of bare inference over the same tensors."""
    from qyolo_deploy.stages.bench_validate import BenchValidateSettings, bench_table, caption, run_bench

    with Reporter(quiet).progress("validations in turn") as tick:
        result = run_bench(engine, data, BenchValidateSettings(imgsz, images, rounds, ultralytics), tick)
    if not quiet:
        stdout().print(caption(result), markup=False, soft_wrap=True)
        _print_table(*bench_table(result))
    if as_json:
        print(json.dumps(result))


def _made(
    weights: str,
    data: str,
    imgsz: int,
    images: int,
    out: Path,
    schemes: Sequence[str],
    peers: bool,
    hints: Sequence[str],
    reporter: Reporter,
) -> "list[Subject]":
    """Rows of engines that are made of float weights, or were when they were last asked for."""
    from qyolo_deploy.pipeline import build
    from qyolo_deploy.stages.bench_engines_own import own_subjects, write_recipe
    from qyolo_deploy.stages.bench_engines_peers import FloatModel, peer_subjects

    model = FloatModel(weights, data, imgsz, images, out)
    own, subjects = model.folder / "own", []
    for scheme in schemes:
        recipe = write_recipe(own, scheme, model.checkpoint, model.data, imgsz, model.images)
        built = build(recipe, out=own / scheme, until="export", reporter=reporter, share=own)
        subjects += own_subjects(built.folder, scheme, hints)
    if peers:
        with reporter.progress("making peers") as tick:
            subjects += peer_subjects(model, hints, tick)
    return subjects
