"""`cxr archive`."""

import json
from pathlib import Path

import click

from cxr.errors import ModelLoadError


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out", "-o", type=click.Path(dir_okay=False, path_type=Path), help="The .mar to write."
)
@click.option("--check", is_flag=True, help="BUNDLE is a .mar: only check that it is whole.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def archive(bundle: Path, out: Path | None, check: bool, as_json: bool) -> None:
    """Pack an exported BUNDLE into a self-contained TorchServe archive, or check one.

    \b
    cxr archive runs/demo/bundle --out runs/demo/cxr.mar
    cxr archive --check runs/demo/cxr.mar

    The same bundle always gives the same bytes.
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from cxr.config import file_sha256  # noqa: PLC0415 - keeps `cxr --help` fast
    from cxr.mar import verify  # noqa: PLC0415
    from cxr_archive.packager import pack  # noqa: PLC0415

    if check == (out is not None):
        raise click.UsageError("Give either --out FILE.mar or --check.")
    try:
        if out is not None:
            pack(bundle, out)
        path = bundle if out is None else out
        config = verify(path)
    except ModelLoadError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"Cannot write {out}: {error.strerror}.") from error
    facts = {
        "archive": str(path),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "name": config.name,
        "version": config.version,
        "labels": list(config.labels),
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(f"{path}: {config.name} {config.version}, {path.stat().st_size / 2**20:.1f} MiB")
    click.echo(f"labels  {', '.join(config.labels)}")
    click.echo(f"sha256  {facts['sha256']}")
