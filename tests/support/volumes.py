"""Volumes on a cluster: not every one makes them by itself."""

import contextlib
import json
from collections.abc import Iterator

from support.cluster import run


def on_the_node(image: str, *command: str) -> str:
    """Run a command as root in a container with /var/tmp of the first node; what it printed."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "cxr-e2e-node"},
        "spec": {
            "nodeName": _node(),
            "restartPolicy": "Never",
            "containers": [
                {
                    "name": "node",
                    "image": image,
                    "command": list(command),
                    "securityContext": {"runAsUser": 0},
                    "volumeMounts": [{"name": "tmp", "mountPath": "/var/tmp"}],  # noqa: S108
                }
            ],
            "volumes": [{"name": "tmp", "hostPath": {"path": "/var/tmp"}}],  # noqa: S108
        },
    }
    outside = ("kubectl", "-n", "default")
    run(*outside, "apply", "-f", "-", stdin=json.dumps(pod))
    try:
        done = "jsonpath={.status.phase}=Succeeded"
        run(*outside, "wait", f"--for={done}", "--timeout=60s", "pod/cxr-e2e-node")
        return run(*outside, "logs", "cxr-e2e-node")
    finally:
        run(*outside, "delete", "pod", "cxr-e2e-node", "--now")


def folder_of(name: str) -> str:
    """Where a volume is, on the node."""
    return f"/var/tmp/{name}"  # noqa: S108


@contextlib.contextmanager
def local_volume(name: str, image: str) -> Iterator[str]:
    """A storage class with one volume, a folder of a node.

    Args:
        name: of both.
        image: in the cluster, with a shell's usual programs.
    """
    folder = folder_of(name)
    on_the_node(image, "mkdir", "-p", folder)
    host = {"key": "kubernetes.io/hostname", "operator": "In", "values": [_node()]}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "storageClassName": name,
            "capacity": {"storage": "5Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": folder},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [host]}]}},
        },
    }
    run("kubectl", "apply", "-f", "-", stdin=json.dumps(volume))
    try:
        yield name
    finally:
        run("kubectl", "delete", "pv", name, "--wait=false")
        on_the_node(image, "rm", "-r", folder)


def _node() -> str:
    found = json.loads(run("kubectl", "get", "nodes", "-o", "json"))["items"][0]
    name: str = found["metadata"]["name"]
    return name
