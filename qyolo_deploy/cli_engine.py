"""`qyolo engine`: engines that are finished on the device that runs them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qyolo_deploy.cli_output import Json, Quiet, make_table, stdout
from qyolo_deploy.cli_release import SignKey, check_key
from qyolo_deploy.console import Reporter
from qyolo_deploy.engines.tensorrt_runtime import Flavor
from qyolo_deploy.errors import GateFailedError

app = typer.Typer(help="Finish engines on the device that runs them.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `build` a command of its own while it is the only one."""


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="A build, a release, its engines/tensorrt folder or build.json.")],
    data: Annotated[str | None, typer.Option(help="Dataset to measure the engine on; without it, it is built.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of engine and release; by default build.json's, or RELEASE-tensorrt.")
    ] = None,
    runtime: Annotated[Flavor | None, typer.Option(help="By default the one that is installed.")] = None,
    sign_key: SignKey = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build a TensorRT engine from its build.json, measure it, check its gates and release it; torch is not needed."""
    from qyolo_deploy.stages.device import build_on_device

    if sign_key is not None:
        check_key(sign_key)
    result = build_on_device(bundle, data, out, runtime, Reporter(quiet), sign_key)
    facts = result.to_json()
    if not quiet:
        table = make_table("engine", "status", "mAP50-95", "p50 ms", "weights MB", "gates")
        view = facts["views"][0] if facts["views"] else None
        weights = facts["record"]["weights_bytes"]
        table.add_row(
            result.engine.name,
            facts["status"],
            "-" if view is None else f"{view['map50_95'] * 100:.2f}",
            "-" if view is None else f"{view['latency_ms']['p50']:.2f}",
            "-" if weights is None else f"{weights / 1e6:.2f}",
            f"{sum(gate.passed for gate in result.gates)}/{len(result.gates)} passed" if result.gates else "-",
        )
        stdout().print(table)
        for path in (result.engine, result.plan, *([] if result.release is None else [result.release])):
            stdout().print(str(path), markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(facts))
    if failed := [gate for gate in result.gates if not gate.passed]:
        if not as_json:
            raise GateFailedError(f"{len(failed)} of {len(result.gates)} gates failed: {failed[0].reason}")
        raise typer.Exit(GateFailedError.exit_code)
