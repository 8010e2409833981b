"""What the gateway can be told; the one place of its defaults."""

import math
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path

from cxr.decode import DEFAULT_LIMITS, DecodeLimits

PORT = 8090
METRICS_PORT = 8092
# Where `cxr serve` listens by default.
MODEL_SERVER = "127.0.0.1:8081"
# Seconds that a request has beside those for its images.
_ANSWER_SECONDS = 5
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class AuthPolicy(StrEnum):
    """Whether callers must say who they are."""

    NONE = "none"
    REQUIRED = "required"


class Scope(StrEnum):
    """What a caller may do. Models can be read with any of them."""

    PREDICT = "predict"
    JOBS = "jobs"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the gateway runs.

    Attributes:
        host: address to listen on.
        port: of the API and the page; 0 picks a free one.
        metrics_port: of Prometheus' metrics; 0 picks a free one.
        server: the model's gRPC address.
        server_tls: speak TLS to it.
        server_ca: PEM file of who signs its certificate; the system's without it.
        model: the model's name.
        timeout: seconds for one image.
        drain_delay: seconds after SIGTERM in which new requests are still taken, so that load
            balancers can see that the gateway is no longer ready.
        database: SQLAlchemy's URL.
        auth: whether callers must say who they are.
        oidc_issuer: whose tokens are taken beside API keys; empty for none.
        oidc_audience: whom they must be meant for.
        oidc_jwks: where the issuer's keys are; empty to ask the issuer.
        allowed_hosts: names under which it may be called; empty for any.
        cors_origins: origins of other web pages that may call it.
        limits: of one image.
        max_images: files in one request for predictions.
        max_job_images: files in one job.
        max_active_jobs: unfinished jobs of one caller.
        images_per_minute: of one caller, where its key says nothing else.
        rate_storage: URL of the Redis or Valkey in which gateways count together; empty where each
            counts by itself.
        max_in_flight: images that are asked about at once, jobs not counted; more get 503.
        job_workers: images of jobs that are asked about at once; 0 where jobs are not offered.
        retention: how long jobs, results and idempotency keys are kept.
        tracing: send traces to where OpenTelemetry's environment variables say.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    metrics_port: int = METRICS_PORT
    server: str = MODEL_SERVER
    server_tls: bool = False
    server_ca: Path | None = None
    model: str = "cxr"
    timeout: float = 30.0
    drain_delay: float = 1.0
    database: str = "sqlite:///cxr-portal.db"
    auth: AuthPolicy = AuthPolicy.REQUIRED
    oidc_issuer: str = ""
    oidc_audience: str = ""
    oidc_jwks: str = ""
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    limits: DecodeLimits = DEFAULT_LIMITS
    max_images: int = 16
    max_job_images: int = 1000
    max_active_jobs: int = 5
    images_per_minute: int = 600
    rate_storage: str = ""
    max_in_flight: int = 64
    job_workers: int = 4
    retention: timedelta = timedelta(hours=24)
    tracing: bool = False

    @property
    def grace(self) -> int:
        """Seconds for requests in flight at the end: the longest one, and the way of its answer."""
        return math.ceil(self.timeout) + _ANSWER_SECONDS

    @property
    def max_request_bytes(self) -> int:
        """Body size of a request for predictions: two images of the largest size."""
        return 2 * self.limits.max_bytes

    @property
    def max_job_bytes(self) -> int:
        """Body size of a job, all of which is held in memory: 8 images of the largest size."""
        return 8 * self.limits.max_bytes

    @property
    def max_held_bytes(self) -> int:
        """Of the bodies of all requests in progress together: two jobs of the largest size."""
        return 2 * self.max_job_bytes


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    return host in _LOOPBACK
