"""docs/portal.md lists what the gateway counts."""

from prometheus_client.metrics import MetricWrapperBase

from cxr_portal.metrics import Metrics
from support.metrics import PORTAL_CATALOGUE, documented


def test_the_catalogue_is_what_there_is() -> None:
    found = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = (family.type, set(metric._labelnames))
    assert documented(PORTAL_CATALOGUE) == found
