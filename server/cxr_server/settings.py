"""Settings of the serving process. The defaults stand here and nowhere else."""

import contextlib
import math
import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cxr.decode import DEFAULT_LIMITS, DecodeLimits

REST_PORT = 8080
GRPC_PORT = 8081
METRICS_PORT = 8082


CGROUP = Path("/sys/fs/cgroup")
# Files of quota and period, in microseconds: of cgroup v2, and of v1.
_CPU_LIMITS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def available_cores(cgroup: Path = CGROUP) -> int:
    """CPU cores that this process may use: its affinity, and the CPU limit of its cgroup.

    A container's CPU limit does not show in the number of processors.
    """
    cores = len(os.sched_getaffinity(0))
    for files in _CPU_LIMITS:
        # No such version of cgroups, or no limit: `max` in v2, -1 in v1.
        with contextlib.suppress(OSError, ValueError):
            words = " ".join((cgroup / name).read_text(encoding="ascii") for name in files)
            quota, period = map(int, words.split())
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def address(host: str, port: int) -> str:
    """Host and port as URLs write them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class RuntimeName(StrEnum):
    """What runs the model: TorchServe, or worker processes of this service's own."""

    TORCHSERVE = "torchserve"
    INPROCESS = "inprocess"


class SignaturePolicy(StrEnum):
    """What an archive without a good signature means."""

    OFF = "off"
    WARN = "warn"
    ENFORCE = "enforce"


class QualityPolicy(StrEnum):
    """What becomes of an image that the model's guards find fault with."""

    OFF = "off"
    FLAG = "flag"
    REFUSE = "refuse"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the service runs.

    Attributes:
        runtime: what runs the model.
        host: address that REST, gRPC and metrics listen on.
        rest_port: 0 picks a free port, as for the other two.
        signature_policy: `OFF` does not look at signatures; `WARN` serves and logs what is wrong;
            `ENFORCE` refuses.
        verify_key: public key that archives must be signed by; needed unless the policy is `OFF`.
        quality_policy: `OFF` asks no guards; `FLAG` answers and says what is wrong; `REFUSE`
            answers nothing but that.
        workers: processes that each hold the model; by default one per available core.
        limits: the largest image that is accepted.
        max_batch: images in one request, at most.
        max_queue: images that wait or are being answered, at most; what would wait for longer than
            the request timeout is better sent to another replica.
        request_timeout: seconds that one image may take, queueing included, and that a request may
            take to arrive.
        startup_timeout: seconds from start until every worker has answered a warm-up image, and
            later for a worker to come back where none is left.
        drain_delay: seconds after SIGTERM in which new requests are still taken, so that load
            balancers can see that the service is no longer ready.
        grace_period: seconds after that for requests in flight.
        connection_age: seconds after which a gRPC client is asked to connect anew, so that clients
            which spread their calls find new replicas. Calls in flight end as they would.
        tracing: send traces to where OpenTelemetry's environment variables say.
        verbose: log what the runtime logs.
    """

    runtime: RuntimeName = RuntimeName.TORCHSERVE
    host: str = "127.0.0.1"
    rest_port: int = REST_PORT
    grpc_port: int = GRPC_PORT
    metrics_port: int = METRICS_PORT
    signature_policy: SignaturePolicy = SignaturePolicy.OFF
    verify_key: Path | None = None
    quality_policy: QualityPolicy = QualityPolicy.FLAG
    workers: int = field(default_factory=available_cores)
    limits: DecodeLimits = DEFAULT_LIMITS
    max_batch: int = 64
    max_queue: int = 1000
    request_timeout: float = 60.0
    startup_timeout: float = 180.0
    drain_delay: float = 1.0
    grace_period: float = 30.0
    connection_age: float = 60.0
    tracing: bool = False
    verbose: bool = False

    @property
    def threads_per_worker(self) -> int:
        """Threads of one forward pass, so that all workers together fill the cores once."""
        return max(1, available_cores() // self.workers)

    @property
    def max_request_bytes(self) -> int:
        """Body size that is read at all: one image of the largest size in Base64, or a batch."""
        return 2 * self.limits.max_bytes
