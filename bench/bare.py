"""`cxr` without metrics: counters and histograms that count nothing."""

from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from cxr.cli import main
from cxr_server.metrics import Metrics


def nothing(*_: Any, **__: Any) -> None:
    """In place of what would count."""


for kind, methods in ((Counter, ("inc",)), (Gauge, ("inc", "dec")), (Histogram, ("observe",))):
    for method in methods:
        setattr(kind, method, nothing)
for method in ("request", "arrived", "image", "compared", "predicted"):
    setattr(Metrics, method, nothing)

if __name__ == "__main__":
    main()
