"""`qyolo selftest` and `qyolo release`: arguments, tables and JSON."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from qyolo_deploy.cli_output import Json, Quiet, make_table, stdout
from qyolo_deploy.console import Reporter
from qyolo_deploy.errors import InputError, SelftestError

if TYPE_CHECKING:
    from qyolo_deploy.release.verify import VerifiedRelease

app = typer.Typer(help="Sign, pack and unpack releases.", no_args_is_help=True)

Release = Annotated[Path, typer.Argument(help="Release folder, with its manifest.json.")]
SignKey = Annotated[
    Path | None, typer.Option(envvar="QYOLO_SIGN_KEY", help="Private key (PEM) to sign the release with.")
]
_MANIFESTS_OWN = ("imgsz", "conf", "iou", "precision_hint")


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
                table.add_row(escape(check.view), check.status, *5 * ("-",))
                continue
            machine = "same" if check.same_machine else "another"
            numbers = (f"{found.relative_error:.2g}", f"{found.score:.2g}", f"{found.iou:.3f}", str(check.detections))
            table.add_row(escape(check.view), check.status, machine, *numbers)
        stdout().print(table)
    if as_json:
        print(json.dumps({"release": str(release), "engines": [check.to_json() for check in checks]}))
    if off := [check for check in checks if check.status == "off"]:
        if not as_json:
            raise SelftestError(off[0].describe(), "Look at the pre-processing and the runtime's version first.")
        raise typer.Exit(SelftestError.exit_code)


def is_release(path: Path) -> bool:
    """Whether a folder is a release rather than an engine."""
    return (path / "manifest.json").is_file()


def verify_any(path: Path, key: Path | None) -> "VerifiedRelease":
    """Verifies a release folder, or a packed one."""
    from qyolo_deploy.release.pack import SUFFIX, verify_packed
    from qyolo_deploy.release.verify import verify_release

    return verify_packed(path, key) if path.name.endswith(SUFFIX) and not path.is_dir() else verify_release(path, key)


def validate(
    context: typer.Context,
    release: Path,
    data: str,
    engine: str | None,
    latency_runs: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """`qyolo validate` of a release: sizes, thresholds and hints are its manifest's."""
    from qyolo_deploy.device.accuracy import validate_release
    from qyolo_deploy.release.verify import verify_release

    for name in _MANIFESTS_OWN:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = name.replace("_", "-")
            hint = "Name the engine's file instead to measure it in another way."
            raise InputError(f"--{option}: the manifest of {release} says how it is validated", hint)
    verified = verify_release(release)
    with Reporter(quiet).progress(f"validating {release.name}") as tick:
        check = validate_release(verified, data, engine, latency_runs=latency_runs, progress=tick)
    if not quiet:
        table = make_table("engine", "metric", "here", "released", "data")
        for metric, released in check.released.items():
            here = getattr(check.report.metrics, metric)
            place = "same" if check.same_data else "other"
            table.add_row(escape(check.report.name), metric, f"{here:.6f}", f"{released:.6f}", place)
        stdout().print(table)
    if as_json:
        print(json.dumps(check.to_json()))


def check_key(key: Path) -> None:
    """Refuses a key that could not sign, before a build begins."""
    from qyolo_deploy.release.sign import read_private_key

    read_private_key(key)


def sign_build(folder: Path, key: Path) -> None:
    """Signs the release of a build."""
    from qyolo_deploy.release.verify import sign_release

    sign_release(folder / "release", key)


@app.command()
def schema() -> None:
    """Print the JSON Schema of manifests."""
    from qyolo_deploy.release.manifest import manifest_schema

    print(json.dumps(manifest_schema(), indent=1))


@app.command()
def sign(
    release: Release,
    key: Annotated[Path, typer.Option(envvar="QYOLO_SIGN_KEY", help="Private key (PEM): ECDSA or Ed25519.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sign a release with a key that you hold."""
    from qyolo_deploy.release.verify import sign_release

    file = sign_release(release, key)
    if not quiet:
        stdout().print(f"signature: {file}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"release": str(release), "signature": str(file)}))


@app.command()
def pack(
    release: Release,
    out: Annotated[Path, typer.Option(help="File NAME.tar.zst, or new folder for oci.")],
    format_: Annotated[Literal["tar.zst", "oci"], typer.Option("--format", help="What to write.")] = "tar.zst",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pack a release into one reproducible file, or into an OCI image layout for a registry."""
    from qyolo_deploy.release.oci import pack_oci
    from qyolo_deploy.release.pack import pack_tar
    from qyolo_deploy.release.verify import verify_release

    packed = (pack_tar if format_ == "tar.zst" else pack_oci)(verify_release(release), out)
    if not quiet:
        stdout().print(f"packed: {packed}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"release": str(release), "packed": str(packed), "format": format_}))


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="Packed release, .tar.zst.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    key: Annotated[Path | None, typer.Option(help="Public key (PEM) whose holder must have signed it.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Unpack a release and verify it; a folder that fails does not appear."""
    from qyolo_deploy.release.pack import unpack as run_unpack

    verified = run_unpack(file, out, key)
    if not quiet:
        stdout().print(f"release: {out}, signature: {verified.signature}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"release": str(out), "digest": verified.digest, "signature": verified.signature}))
