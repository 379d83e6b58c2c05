"""`qyolo selftest` and `qyolo release`: arguments, tables and JSON."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qyolo_deploy.cli_output import Json, Quiet, make_table, stdout
from qyolo_deploy.console import Reporter
from qyolo_deploy.errors import SelftestError

Release = Annotated[Path, typer.Argument(help="Release folder, with its manifest.json.")]


def selftest(
    release: Release,
    engine: Annotated[str | None, typer.Option(help="View to run, such as onnxruntime; by default all.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a release's golden vectors: does this machine compute what was validated?"""
    from qyolo_deploy.device.selftest import selftest as run_selftest
    from qyolo_deploy.release.verify import verify_release

    verified = verify_release(release)
    with Reporter(quiet).progress("running golden vectors") as tick:
        checks = run_selftest(verified, engine, tick)
    if not quiet:
        table = make_table("engine", "status", "machine", "outputs off by", "scores off by", "IoU", "detections")
        for check in checks:
            if (found := check.difference) is None:
                table.add_row(check.view, check.status, *5 * ("-",))
                continue
            machine = "same" if check.same_machine else "another"
            numbers = (f"{found.relative_error:.2g}", f"{found.score:.2g}", f"{found.iou:.3f}", str(check.detections))
            table.add_row(check.view, check.status, machine, *numbers)
        stdout().print(table)
    if as_json:
        print(json.dumps({"release": str(release), "engines": [check.to_json() for check in checks]}))
    if off := [check for check in checks if check.status == "off"]:
        if not as_json:
            raise SelftestError(off[0].describe(), "Look at the pre-processing and the runtime's version first.")
        raise typer.Exit(SelftestError.exit_code)
