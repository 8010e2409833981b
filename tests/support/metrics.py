"""Which metrics there are, and which ones a query asks for."""

import re
from pathlib import Path

CATALOGUE = Path(__file__).parents[2] / "docs" / "metrics.md"
PORTAL_CATALOGUE = CATALOGUE.with_name("portal.md")
# Of Prometheus itself and of other exporters, which a cluster may have.
FOREIGN = {
    "ALERTS",
    "up",
    "kube_deployment_spec_replicas",
    "kube_deployment_status_replicas_available",
    "probe_ssl_earliest_cert_expiry",
    "certmanager_certificate_expiration_timestamp_seconds",
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_FB_USED",
}


def documented(catalogue: Path = CATALOGUE) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric in a catalogue."""
    text = catalogue.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\|", text, re.MULTILINE)
    found = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(found) == len(rows)
    return found


def known() -> set[str]:
    """Names that a query may use."""
    names = set(FOREIGN)
    for name, (kind, _) in (documented() | documented(PORTAL_CATALOGUE)).items():
        parts = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
        names |= {f"{name}{part}" for part in parts}
    return names


def asked(query: str) -> set[str]:
    """Names of the metrics in a query that selects each with braces."""
    return set(re.findall(r"([A-Za-z_][\w:]*)\{", query))
