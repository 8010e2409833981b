"""The portal of a release on a real cluster."""

import json
from dataclasses import dataclass
from typing import Any

import httpx

from support.cluster import Namespace, setting


def image() -> str:
    """The portal's image in the cluster."""
    return setting("CXR_E2E_PORTAL_IMAGE", "image of the portal in the cluster")


def values(host: str, storage_class: str) -> list[str]:
    """What a release sets to have a portal, on a volume of that class."""
    repository, _, tag = image().rpartition(":")
    return [
        "portal.enabled=true",
        f"portal.host={host}",
        f"portal.image.repository={repository}",
        f"portal.image.tag={tag}",
        "portal.resources.requests.cpu=50m",
        f"portal.database.volume.storageClassName={storage_class}",
        "portal.database.volume.size=1Gi",
        "portal.limits.jobWorkers=1",
    ]


@dataclass(kw_only=True)
class Portal:
    """The release, and a way to its portal.

    Attributes:
        cluster: the release's namespace.
        host: name under which the gateway knows it.
        key: an API key.
    """

    cluster: Namespace
    host: str
    key: str = ""

    @property
    def name(self) -> str:
        """Of the portal's objects."""
        return f"{self.cluster.service}-portal"

    def http(self, **headers: str) -> httpx.Client:
        """A client, with the key unless another one is given."""
        given = {"Host": self.host, "Authorization": f"Bearer {self.key}", **headers}
        address = setting("CXR_E2E_GATEWAY_ADDRESS", "host:port of the gateway")
        return httpx.Client(base_url=f"http://{address}", headers=given, timeout=30)

    def rolled_out(self) -> None:
        """Wait until every replica is of the newest revision and ready."""
        self.cluster.kubectl("rollout", "status", f"deploy/{self.name}", "--timeout=120s")

    def execute(self, *command: str) -> str:
        """Run a command in a pod of the portal; what it printed."""
        return self.cluster.kubectl("exec", f"deploy/{self.name}", "--", *command)

    def pods(self) -> list[dict[str, Any]]:
        """Those that end left out."""
        label = "app.kubernetes.io/component=portal"
        pods = self.cluster.get("pods", "-l", label)["items"]
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def pod(self) -> dict[str, Any]:
        """The only one."""
        (only,) = self.pods()
        return only

    def make_key(self) -> None:
        """Make an API key in a pod."""
        pod = self.pods()[0]["metadata"]["name"]
        command = ("cxr", "portal", "keys", "create", "e2e", "--json")
        made = self.cluster.kubectl("exec", pod, "--", *command)
        self.key = json.loads(made.splitlines()[-1])["key"]
