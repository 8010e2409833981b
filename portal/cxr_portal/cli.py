"""`cxr portal`: the gateway, its API keys, and its OpenAPI document."""

import json
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from cxr.decode import DEFAULT_LIMITS, PILLOW_MAX_PIXELS, DecodeLimits
from cxr.logs import LogFormat
from cxr_portal.settings import (
    METRICS_PORT,
    MODEL_SERVER,
    PORT,
    AuthPolicy,
    Scope,
    Settings,
    is_loopback,
)

if TYPE_CHECKING:
    from cxr_portal.main import Endpoints
    from cxr_portal.store import ApiKey, Store

log = logging.getLogger(__name__)

_DEFAULTS = Settings()
_ENVIRONMENT = "CXR_PORTAL"
_OTLP_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_HOUR = 3600.0
_RATE_STORAGES = ("redis", "rediss", "valkey", "valkeys")

_database = click.option(
    "--database",
    default=_DEFAULTS.database,
    show_default=True,
    envvar=f"{_ENVIRONMENT}_DATABASE",
    help="URL of the database: sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/NAME.",
)


class _Portal(click.Group):
    """A group that runs the gateway where its first word is no subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Portal)
def portal() -> None:
    """The portal: an API and a page in front of a served model.

    \b
    cxr portal runs/demo/cxr.mar           serve that model, with the page, on this machine
    cxr portal --server HOST:8081          in front of a running `cxr serve`
    cxr portal keys create ...             API keys

    Without a subcommand it is `cxr portal run`: see `cxr portal run --help`.
    """  # noqa: D301 - \b is click's mark for "keep these lines"


@portal.command(context_settings={"auto_envvar_prefix": _ENVIRONMENT, "show_default": True})
@click.argument("archive", type=click.Path(exists=True, path_type=Path), required=False)
@click.option(
    "--server",
    default=MODEL_SERVER,
    help="gRPC address of `cxr serve`, where ARCHIVE is not named. dns:///NAME:PORT uses all "
    "addresses of a name by turns.",
)
@click.option("--server-tls", is_flag=True, help="Speak TLS to it.")
@click.option(
    "--server-ca",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="CA.pem",
    help="Who signs its certificate; the system's authorities without it.",
)
@click.option("--model", default=_DEFAULTS.model, help="The model's name.")
@click.option("--host", default=_DEFAULTS.host, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=PORT, type=click.IntRange(0, 65535))
@click.option("--metrics-port", default=METRICS_PORT, type=click.IntRange(0, 65535))
@_database
@click.option(
    "--auth",
    type=click.Choice([policy.value for policy in AuthPolicy]),
    show_default="none where only this machine can reach --host, else required",
    help="Whether callers need an API key or a token.",
)
@click.option("--oidc-issuer", default="", help="Take tokens of this issuer, too: its URL.")
@click.option("--oidc-audience", default="", help="Whom its tokens must be meant for.")
@click.option(
    "--oidc-jwks", default="", help="URL of its keys.", show_default="what the issuer says"
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="Name under which it may be called; may be given several times.",
    show_default="localhost and --host where only this machine can reach it, else any",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    help="Origin of another web page that may call the API; may be given several times.",
)
@click.option(
    "--timeout",
    default=_DEFAULTS.timeout,
    type=click.FloatRange(0, min_open=True),
    help="Seconds for one image; requests in flight have as long at the end.",
)
@click.option(
    "--drain-delay",
    default=_DEFAULTS.drain_delay,
    type=click.FloatRange(0),
    help="Seconds after SIGTERM in which new requests are still taken.",
)
@click.option(
    "--max-image-bytes",
    default=DEFAULT_LIMITS.max_bytes,
    type=click.IntRange(1),
    help="Largest encoded image. A request may have twice of it, a job 8 times.",
)
@click.option(
    "--max-images", default=_DEFAULTS.max_images, type=click.IntRange(1, 64), help="Per request."
)
@click.option(
    "--max-job-images",
    default=_DEFAULTS.max_job_images,
    type=click.IntRange(1, 10_000),
    help="Per job.",
)
@click.option(
    "--max-active-jobs",
    default=_DEFAULTS.max_active_jobs,
    type=click.IntRange(1),
    help="Unfinished jobs of one caller.",
)
@click.option(
    "--images-per-minute",
    default=_DEFAULTS.images_per_minute,
    type=click.IntRange(1),
    help="Of one caller, jobs not counted, where its key says nothing else.",
)
@click.option(
    "--rate-storage",
    default=_DEFAULTS.rate_storage,
    help="Redis or Valkey in which all gateways count them together: redis://HOST, or "
    "rediss://USER:PASSWORD@HOST over TLS.",
    show_default="each process counts by itself",
)
@click.option(
    "--max-in-flight",
    default=_DEFAULTS.max_in_flight,
    type=click.IntRange(1),
    help="Images that are asked about at once, jobs not counted; more are turned away.",
)
@click.option(
    "--job-workers",
    default=_DEFAULTS.job_workers,
    type=click.IntRange(0),
    help="Images of jobs that are asked about at once; 0 offers no jobs.",
)
@click.option(
    "--retention-hours",
    default=_DEFAULTS.retention.total_seconds() / _HOUR,
    type=click.FloatRange(0, min_open=True),
    help="How long jobs and their results are kept. Images never are, once they have an answer.",
)
@click.option(
    "--log-format",
    default=LogFormat.TEXT.value,
    type=click.Choice([log_format.value for log_format in LogFormat]),
)
@click.option(
    "--tracing",
    is_flag=True,
    help=f"Send traces over OTLP/HTTP to the environment variable {_OTLP_ENDPOINT}.",
)
@click.option("--json", "as_json", is_flag=True, help="Announce readiness as one JSON object.")
def run(
    *,
    archive: Path | None,
    log_format: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the gateway with its page until SIGTERM, on http://127.0.0.1:8090.

    With ARCHIVE, a .mar, it serves that model itself; else it asks the one at --server.

    Each option can be given as an environment variable: --auth as CXR_PORTAL_AUTH. A port of 0
    picks a free one. Exit code 0 after SIGTERM or Ctrl-C, 1 when it could not start or go on.
    """
    from cxr.logs import configure  # noqa: PLC0415 - keeps `cxr --help` fast
    from cxr_portal.main import PortalError  # noqa: PLC0415
    from cxr_portal.main import run as serve  # noqa: PLC0415

    settings = _settings(options)
    configure(LogFormat(log_format))

    def announce(endpoints: "Endpoints") -> None:
        if as_json or log_format == LogFormat.JSON:
            document = {"event": "ready", "portal": endpoints.portal, "metrics": endpoints.metrics}
            click.echo(json.dumps(document))
        else:
            click.echo(f"Ready: {endpoints.portal}  metrics {endpoints.metrics}")

    try:
        serve(settings, archive, announce)
    except PortalError as error:
        if log_format == LogFormat.JSON:
            log.critical("%s", error)
            raise click.exceptions.Exit(1) from error
        raise click.ClickException(str(error)) from error


def environment_settings() -> Settings:
    """What the environment variables of `cxr portal run` say.

    Raises:
        click.UsageError: something that does not fit together.
    """
    with run.make_context("run", []) as context:
        options = dict(context.params)
    for name in ("archive", "log_format", "as_json"):
        del options[name]
    return _settings(options)


def _settings(options: dict[str, Any]) -> Settings:
    """The command's options, checked together."""
    policy, retention = options.pop("auth"), options.pop("retention_hours")
    max_bytes = options.pop("max_image_bytes")
    local = is_loopback(options["host"])
    if local and not options["allowed_hosts"]:
        # Else another page could reach this one by a name of its own for this address.
        options["allowed_hosts"] = ("localhost", options["host"])
    _check_oidc(options)
    options["rate_storage"] = options["rate_storage"].strip()
    _check_rate_storage(options["rate_storage"])
    if options["tracing"] and not os.environ.get(_OTLP_ENDPOINT):
        raise click.UsageError(
            f"--tracing needs {_OTLP_ENDPOINT}, the URL of a collector, for instance "
            "http://127.0.0.1:4318."
        )
    return Settings(
        auth=AuthPolicy(policy) if policy else AuthPolicy.NONE if local else AuthPolicy.REQUIRED,
        limits=DecodeLimits(max_bytes=max_bytes, max_pixels=PILLOW_MAX_PIXELS),
        retention=timedelta(hours=retention),
        **options,
    )


def _check_oidc(options: dict[str, Any]) -> None:
    issuer, audience = options["oidc_issuer"], options["oidc_audience"]
    if bool(issuer) != bool(audience):
        raise click.UsageError("--oidc-issuer and --oidc-audience go together.")
    for name in ("oidc_issuer", "oidc_jwks"):
        url = options[name]
        host = url.removeprefix("http://").partition("/")[0].rpartition(":")[0]
        if url and not url.startswith("https://") and not is_loopback(host):
            raise click.UsageError(f"--{name.replace('_', '-')} must begin with https://.")


def _check_rate_storage(url: str) -> None:
    try:
        parts = urlsplit(url)
        known = parts.scheme in _RATE_STORAGES and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if url and not known:
        # Without the URL, which may hold a password.
        raise click.UsageError("--rate-storage must look like redis://HOST:6379.")


@portal.command()
def openapi() -> None:
    """Print the API's OpenAPI document."""
    from cxr_portal.app import create_app  # noqa: PLC0415 - keeps `cxr --help` fast

    click.echo(json.dumps(create_app(Settings()).openapi(), indent=2))


@portal.command()
@_database
def migrate(database: str) -> None:
    """Bring the database's tables to this release.

    `cxr portal run` and `cxr portal keys` do that, too, one at a time however many are started.
    """
    before, after = _opened(database).revisions
    click.echo(
        f"Revision {after}; nothing to do."
        if before == after
        else f"Revision {after}, from {before or 'an empty database'}."
    )


@portal.group()
def keys() -> None:
    """API keys: who may call the gateway.

    A key is shown once, when it is made; the database has only its digest.
    """


_lifetime = click.option(
    "--days",
    type=click.FloatRange(0, min_open=True),
    help="Until it expires.",
    show_default="it does not",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@keys.command()
@click.argument("name")
@_database
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    default=[scope.value for scope in Scope],
    show_default=True,
    help="What it allows; may be given several times.",
)
@click.option("--images-per-minute", type=click.IntRange(1), help="Its own limit.")
@_lifetime
@_json
def create(  # noqa: PLR0917 - called by name
    name: str,
    database: str,
    scopes: tuple[str, ...],
    images_per_minute: int | None,
    days: float | None,
    as_json: bool,
) -> None:
    """Make a key for NAME, a service or a team; no patient's name belongs here."""
    key, text = _opened(database).create_key(
        name,
        frozenset(map(Scope, scopes)),
        images_per_minute=images_per_minute,
        lifetime=None if days is None else timedelta(days=days),
    )
    _show(key, text, as_json)


@keys.command("list")
@_database
@_json
def list_keys(database: str, as_json: bool) -> None:
    """Show all keys, without their secrets."""
    from tabulate import tabulate  # noqa: PLC0415 - keeps `cxr --help` fast

    rows = [_public(key) for key in _opened(database).all_keys()]
    click.echo(json.dumps({"keys": rows}) if as_json else tabulate(rows, headers="keys"))


@keys.command()
@click.argument("key_id")
@_database
@click.option(
    "--overlap-hours",
    default=24.0,
    show_default=True,
    type=click.FloatRange(0),
    help="How long the old key goes on.",
)
@_lifetime
@_json
def rotate(
    key_id: str, database: str, overlap_hours: float, days: float | None, as_json: bool
) -> None:
    """Make a key in place of KEY_ID, with the same scopes, limit and jobs."""
    made = _opened(database).rotate_key(
        key_id,
        overlap=timedelta(hours=overlap_hours),
        lifetime=None if days is None else timedelta(days=days),
    )
    if made is None:
        raise click.ClickException("There is no valid key of that id.")
    _show(*made, as_json)


@keys.command()
@click.argument("key_id")
@_database
def revoke(key_id: str, database: str) -> None:
    """End KEY_ID; gateways notice within 5 seconds."""
    if not _opened(database).revoke_key(key_id):
        raise click.ClickException("There is no key of that id.")


def _opened(database: str) -> "Store":
    from cxr_portal.store import DatabaseError, open_store  # noqa: PLC0415 - as above

    try:
        return open_store(database)
    except DatabaseError as error:
        raise click.ClickException(str(error)) from error


def _public(key: "ApiKey") -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": " ".join(sorted(key.scopes)),
        "images_per_minute": key.images_per_minute,
        "created": key.created.isoformat(timespec="seconds"),
        "expires": key.expires and key.expires.isoformat(timespec="seconds"),
        "revoked": key.revoked and key.revoked.isoformat(timespec="seconds"),
    }


def _show(key: "ApiKey", text: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(_public(key) | {"key": text}))
    else:
        click.echo(f"Key {key.id} for {key.name}. It is shown only now:\n{text}")
