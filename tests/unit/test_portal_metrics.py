"""docs/metrics.md lists what the gateway counts, with all labels."""

from prometheus_client.metrics import MetricWrapperBase

from cxr_portal.metrics import Metrics
from support.metrics import PORTAL, documented


def test_the_catalogue_is_what_there_is() -> None:
    found = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = (family.type, set(metric._labelnames))
    own = {name: item for name, item in documented().items() if name.startswith(PORTAL)}
    assert own == found
