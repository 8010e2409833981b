"""The cluster's Prometheus, from here."""

from typing import Any

import urllib3

from support.cluster import setting


class Prometheus:
    """Queries about one namespace's service."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._url = setting("CXR_E2E_PROMETHEUS_URL", "URL of Prometheus, from here")
        self._pool = urllib3.PoolManager(retries=3)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What a query gives now: labels under `metric`, the number under `value`."""
        response = self._pool.request(
            "POST", f"{self._url}/api/v1/query", fields={"query": expression}
        )
        assert response.status == 200, f"{expression}\n{response.data[:500]!r}"
        found: list[dict[str, Any]] = response.json()["data"]["result"]
        return found

    def value(self, expression: str) -> float:
        """The one number of a query; NaN where there is none."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else float("nan")

    def alerts(self) -> set[str]:
        """Names of the alerts that fire."""
        firing = self.query(f'ALERTS{{namespace="{self._namespace}", alertstate="firing"}}')
        return {item["metric"]["alertname"] for item in firing}

    def fired(self, seconds: float) -> set[str]:
        """Names of the alerts that have fired at some time in the last so many seconds."""
        firing = f'ALERTS{{namespace="{self._namespace}", alertstate="firing"}}'
        found = self.query(f"last_over_time({firing}[{seconds:.0f}s])")
        return {item["metric"]["alertname"] for item in found}

    def first_fired(self, alert: str, since: float) -> float:
        """Unix time of the evaluation that made an alert fire, the first one after another time."""
        name = f'namespace="{self._namespace}", alertname="{alert}", alertstate="firing"'
        found = self.query(f"ALERTS{{{name}}}[10m]")
        return min(at for item in found for at, _ in item["values"] if at >= since)

    def evaluation_interval(self, alert: str) -> float:
        """Seconds from one evaluation of an alert to the next."""
        response = self._pool.request("GET", f"{self._url}/api/v1/rules", fields={"type": "alert"})
        assert response.status == 200, f"{response.data[:500]!r}"
        return max(
            float(group["interval"])
            for group in response.json()["data"]["groups"]
            if any(rule["name"] == alert for rule in group["rules"])
        )

    def active_since(self, alert: str) -> float | None:
        """Unix time from which on an alert's condition has held; None while it does not."""
        name = f'namespace="{self._namespace}", alertname="{alert}"'
        found = self.query(f"ALERTS_FOR_STATE{{{name}}}")
        return float(found[0]["value"][1]) if found else None
