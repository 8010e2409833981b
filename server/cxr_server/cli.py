"""`cxr serve`."""

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cxr.decode import DEFAULT_LIMITS, PILLOW_MAX_PIXELS, DecodeLimits
from cxr.logs import LogFormat
from cxr_server.settings import (
    GRPC_PORT,
    METRICS_PORT,
    REST_PORT,
    QualityPolicy,
    RuntimeName,
    Settings,
    SignaturePolicy,
    available_cores,
)

if TYPE_CHECKING:
    from cxr_server.main import Endpoints

log = logging.getLogger(__name__)

_DEFAULTS = Settings()
# Where SageMaker puts the model, and what it says about the port; it starts an image with `serve`.
_SAGEMAKER_MODEL = Path("/opt/ml/model")
_SAGEMAKER_PORT = "SAGEMAKER_BIND_TO_PORT"
# As OpenTelemetry's specification names it.
_OTLP_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@click.command(context_settings={"auto_envvar_prefix": "CXR", "show_default": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path), required=False)
@click.option(
    "--runtime",
    default=_DEFAULTS.runtime.value,
    type=click.Choice([runtime.value for runtime in RuntimeName]),
    help="What runs MODEL: TorchServe, or worker processes without it. The answers are the same.",
)
@click.option("--host", default=_DEFAULTS.host, help="Address to listen on; 0.0.0.0 for all.")
@click.option(
    "--rest-port",
    default=REST_PORT,
    type=click.IntRange(0, 65535),
    envvar=["CXR_REST_PORT", _SAGEMAKER_PORT],
)
@click.option("--grpc-port", default=GRPC_PORT, type=click.IntRange(0, 65535))
@click.option("--metrics-port", default=METRICS_PORT, type=click.IntRange(0, 65535))
@click.option(
    "--signature-policy",
    default=_DEFAULTS.signature_policy.value,
    type=click.Choice([policy.value for policy in SignaturePolicy]),
    help="Whether MODEL must be signed: not looked at, a warning in the log, or refused.",
)
@click.option(
    "--verify-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="PUB.pem",
    help="Public key of who may sign MODEL.",
)
@click.option(
    "--quality-policy",
    default=_DEFAULTS.quality_policy.value,
    type=click.Choice([policy.value for policy in QualityPolicy]),
    help="Images that the model's guards find fault with: not looked for, flagged in the answer, "
    "or refused.",
)
@click.option(
    "--workers",
    default=available_cores,
    show_default="one per core",
    type=click.IntRange(1),
    help="Processes that each hold the model; the cores are divided among them.",
)
@click.option(
    "--max-image-bytes",
    default=DEFAULT_LIMITS.max_bytes,
    type=click.IntRange(1),
    help="Largest encoded image.",
)
@click.option(
    "--max-image-pixels",
    default=DEFAULT_LIMITS.max_pixels,
    type=click.IntRange(1, PILLOW_MAX_PIXELS),
    help="Largest decoded image, width times height.",
)
@click.option(
    "--max-batch", default=_DEFAULTS.max_batch, type=click.IntRange(1), help="Images per request."
)
@click.option(
    "--max-queue",
    default=_DEFAULTS.max_queue,
    type=click.IntRange(1),
    help="Images that wait or are being answered; more are turned away.",
)
@click.option(
    "--request-timeout",
    default=_DEFAULTS.request_timeout,
    type=click.FloatRange(0, min_open=True),
    help="Seconds for one image, queueing included, and for a request to arrive.",
)
@click.option(
    "--startup-timeout",
    default=_DEFAULTS.startup_timeout,
    type=click.FloatRange(0, min_open=True),
    help="Seconds until every worker must be ready, at the start and after a restart of all.",
)
@click.option(
    "--drain-delay",
    default=_DEFAULTS.drain_delay,
    type=click.FloatRange(0),
    help="Seconds after SIGTERM in which new requests are still taken.",
)
@click.option(
    "--grace-period",
    default=_DEFAULTS.grace_period,
    type=click.FloatRange(0),
    help="Seconds after that for requests in flight.",
)
@click.option(
    "--connection-age",
    default=_DEFAULTS.connection_age,
    type=click.FloatRange(1),
    help="Seconds after which gRPC clients are asked to connect anew, and find new replicas.",
)
@click.option(
    "--log-format",
    default=LogFormat.TEXT.value,
    type=click.Choice([log_format.value for log_format in LogFormat]),
    help="Lines of the log; json also announces readiness and the reason of the end so.",
)
@click.option(
    "--access-log/--no-access-log",
    default=True,
    help="Log each request for an answer: protocol, status and time, nothing of its content.",
)
@click.option(
    "--tracing",
    is_flag=True,
    help=f"Send traces over OTLP/HTTP to the environment variable {_OTLP_ENDPOINT}.",
)
@click.option("--verbose", is_flag=True, help="Log what the runtime logs.")
@click.option("--json", "as_json", is_flag=True, help="Announce readiness as one JSON object.")
def serve(
    *,
    model: Path | None,
    runtime: str,
    host: str,
    rest_port: int,
    grpc_port: int,
    metrics_port: int,
    signature_policy: str,
    verify_key: Path | None,
    quality_policy: str,
    workers: int,
    max_image_bytes: int,
    max_image_pixels: int,
    max_batch: int,
    max_queue: int,
    request_timeout: float,
    startup_timeout: float,
    drain_delay: float,
    grace_period: float,
    connection_age: float,
    log_format: str,
    access_log: bool,
    tracing: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Serve MODEL, a .mar or a folder with one, over REST and gRPC until SIGTERM.

    Without MODEL, the folder is /opt/ml/model, where SageMaker puts it.

    \b
    cxr serve runs/demo/cxr.mar
    curl --data-binary @image.jpg -H 'Content-Type: image/jpeg' \\
      http://127.0.0.1:8080/v1/models/cxr:predict

    Each option can be given as an environment variable: --rest-port as CXR_REST_PORT. A port of 0
    picks a free one. Exit code 0 after SIGTERM or Ctrl-C, 1 when the model cannot be served.
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from cxr.errors import ModelLoadError  # noqa: PLC0415 - keeps `cxr --help` fast
    from cxr_server.logs import configure  # noqa: PLC0415
    from cxr_server.main import ServeError  # noqa: PLC0415
    from cxr_server.main import serve as run  # noqa: PLC0415

    if model is None:
        if not _SAGEMAKER_MODEL.is_dir():
            raise click.UsageError(
                "Name MODEL, a .mar or a folder with one. Without it, the folder is "
                f"{_SAGEMAKER_MODEL}, which is not there."
            )
        model = _SAGEMAKER_MODEL
    if max_queue < max_batch:
        raise click.UsageError("--max-queue must not be less than --max-batch.")
    if signature_policy != SignaturePolicy.OFF and verify_key is None:
        raise click.UsageError(f"--signature-policy {signature_policy} needs --verify-key PUB.pem.")
    if tracing and not os.environ.get(_OTLP_ENDPOINT):
        raise click.UsageError(
            f"--tracing needs {_OTLP_ENDPOINT}, the URL of a collector, for instance "
            "http://127.0.0.1:4318."
        )
    configure(LogFormat(log_format), access=access_log)
    settings = Settings(
        runtime=RuntimeName(runtime),
        host=host,
        rest_port=rest_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        signature_policy=SignaturePolicy(signature_policy),
        verify_key=verify_key,
        quality_policy=QualityPolicy(quality_policy),
        workers=workers,
        limits=DecodeLimits(max_bytes=max_image_bytes, max_pixels=max_image_pixels),
        max_batch=max_batch,
        max_queue=max_queue,
        request_timeout=request_timeout,
        startup_timeout=startup_timeout,
        drain_delay=drain_delay,
        grace_period=grace_period,
        connection_age=connection_age,
        tracing=tracing,
        verbose=verbose,
    )

    def announce(endpoints: "Endpoints") -> None:
        if as_json or log_format == LogFormat.JSON:
            click.echo(json.dumps({"event": "ready"} | asdict(endpoints)))
        else:
            click.echo(
                f"Ready: REST {endpoints.rest}  gRPC {endpoints.grpc}  metrics {endpoints.metrics}"
            )

    try:
        run(model, settings, announce)
    except (ModelLoadError, ServeError) as error:
        if log_format == LogFormat.JSON:
            log.critical("%s", error)
            raise click.exceptions.Exit(1) from error
        raise click.ClickException(str(error)) from error
