"""Where the service is."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from cxr_loadtests.errors import LoadTestError


@dataclass(frozen=True, kw_only=True)
class Target:
    """A service, as its clients reach it.

    Attributes:
        rest: URL of the REST endpoint.
        grpc: `host:port` of the gRPC endpoint, in clear text or, with `grpcs://` before it, TLS;
            None where there is none.
        host_header: host name to send over REST, where the gateway goes by another than the URL's.
        authority: the same for gRPC.
        headers: sent with every request, for instance a token; never written to a result.
        model: name of the model.
    """

    rest: str
    grpc: str | None = None
    host_header: str | None = None
    authority: str | None = None
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    model: str = "cxr"

    def __post_init__(self) -> None:
        parts = urlsplit(self.rest)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoadTestError("The host must be a URL that begins with http:// or https://.")

    def described(self) -> dict[str, Any]:
        """What a result says of it: no header, no password."""
        rest = urlsplit(self.rest)
        shown = rest._replace(netloc=rest.netloc.rpartition("@")[2]).geturl()
        return {"rest": shown, "grpc": self.grpc, "host": self.host_header, "model": self.model}

    def to_document(self) -> dict[str, Any]:
        """Everything, for another process of this run."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        """Read what `to_document` wrote."""
        return cls(**document)
