"""`cxr archive`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cxr.errors import ModelLoadError

if TYPE_CHECKING:
    from cxr.config import ModelConfig


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out", "-o", type=click.Path(dir_okay=False, path_type=Path), help="The .mar to write."
)
@click.option("--check", is_flag=True, help="BUNDLE is a .mar: only check that it is whole.")
@click.option(
    "--sign",
    "sign_key",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="KEY.pem",
    help="With --out: sign the archive with this private key, into FILE.mar.sig.",
)
@click.option(
    "--verify-key",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PUB.pem",
    help="With --check: also check that the archive is signed by this key.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def archive(
    *,
    bundle: Path,
    out: Path | None,
    check: bool,
    sign_key: Path | None,
    verify_key: Path | None,
    as_json: bool,
) -> None:
    """Pack an exported BUNDLE into a self-contained TorchServe archive, or check one.

    \b
    cxr archive runs/demo/bundle --out runs/demo/cxr.mar
    cxr archive runs/demo/bundle --out runs/demo/cxr.mar --sign KEY.pem
    cxr archive --check runs/demo/cxr.mar --verify-key PUB.pem

    The same bundle always gives the same bytes; the signature is a file beside them. Keys are
    elliptic-curve keys in PEM:

    \b
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY.pem
    openssl pkey -in KEY.pem -pubout -out PUB.pem
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from cxr.config import file_sha256  # noqa: PLC0415 - keeps `cxr --help` fast

    if check == (out is not None):
        raise click.UsageError("Give either --out FILE.mar or --check.")
    if (sign_key and check) or (verify_key and not check):
        raise click.UsageError("--sign goes with --out, --verify-key with --check.")
    try:
        if out is None:
            path = bundle
            config, signature = _check(bundle, verify_key)
        else:
            path = out
            config, signature = _pack(bundle, out, sign_key)
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
    if signature is not None:
        facts["signature"] = str(signature)
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(f"{path}: {config.name} {config.version}, {path.stat().st_size / 2**20:.1f} MiB")
    click.echo(f"labels  {', '.join(config.labels)}")
    click.echo(f"sha256  {facts['sha256']}")
    if signature is not None:
        click.echo(f"signed  {signature}")


def _pack(bundle: Path, out: Path, key: Path | None) -> tuple["ModelConfig", Path | None]:
    from cxr.mar import verify  # noqa: PLC0415
    from cxr_archive.packager import pack  # noqa: PLC0415

    if key is None:
        pack(bundle, out)
        return verify(out), None
    from cxr_archive.signer import signer  # noqa: PLC0415 - needs an extra of its own

    sign = signer(key)
    pack(bundle, out)
    return verify(out), sign(out)


def _check(archive: Path, key: Path | None) -> tuple["ModelConfig", Path | None]:
    from cxr.mar import verify  # noqa: PLC0415

    if key is None:
        return verify(archive), None
    from cxr import signature  # noqa: PLC0415

    path = signature.signature_path(archive)
    signature.check(archive, path, signature.load_public_key(key))
    return verify(archive), path
