"""Which metrics there are, and which ones a query asks for."""

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

CATALOGUE = Path(__file__).parents[2] / "docs" / "metrics.md"
PORTAL = "cxr_portal_"
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


def documented() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric in the catalogue."""
    text = CATALOGUE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\|", text, re.MULTILINE)
    found = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(found) == len(rows)
    return found


def shown(scrape: str) -> dict[str, tuple[str, set[str]]]:
    """Type of each metric in a scrape, and its labels as far as it has counted anything."""
    found = {}
    for family in text_string_to_metric_families(scrape):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
        assert family.documentation, name
    return found


def assert_documented(metrics: dict[str, tuple[str, set[str]]]) -> None:
    """These metrics of a scrape are as the catalogue says."""
    catalogue = documented()
    for name, (kind, labels) in metrics.items():
        assert catalogue[name][0] == kind, name
        # A family that has counted nothing yet has no labels.
        assert labels in (set(), catalogue[name][1]), name


def known() -> set[str]:
    """Names that a query may use."""
    names = set(FOREIGN)
    for name, (kind, _) in documented().items():
        parts = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
        names |= {f"{name}{part}" for part in parts}
    return names


def asked(query: str) -> set[str]:
    """Names of the metrics in a query that selects each with braces."""
    return set(re.findall(r"([A-Za-z_][\w:]*)\{", query))
