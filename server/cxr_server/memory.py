"""Memory of the container that this process runs in: its workers and TorchServe included."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cxr_server.settings import CGROUP

# Version 1 writes an enormous number where there is no limit.
_NO_LIMIT = 2**60


@dataclass(frozen=True)
class _Files:
    """Where a version of cgroups keeps its numbers, and what it calls inactive file cache."""

    usage: str
    limit: str
    stat: str
    inactive: str


_VERSIONS = (
    _Files("memory.current", "memory.max", "memory.stat", "inactive_file"),
    _Files(
        "memory/memory.usage_in_bytes",
        "memory/memory.limit_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


class ContainerMemory(Collector):
    """Working set and limit of the own cgroup; nothing where there is none.

    The working set is what the kernel cannot take back, as Kubernetes reckons it before it evicts:
    usage less inactive file cache.
    """

    def __init__(self, folder: Path = CGROUP) -> None:
        self._folder = folder

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the files; called for every scrape."""
        for files in _VERSIONS:
            usage = self._read(files.usage)
            if not usage.isdigit():
                continue
            yield GaugeMetricFamily(
                "cxr_memory_working_set_bytes",
                "Memory of all processes in the container that cannot be reclaimed.",
                max(0, int(usage) - self._inactive(files)),
            )
            limit = self._read(files.limit)
            if limit.isdigit() and int(limit) < _NO_LIMIT:
                yield GaugeMetricFamily(
                    "cxr_memory_limit_bytes", "Memory that the container may use.", int(limit)
                )
            return

    def _inactive(self, files: _Files) -> int:
        pairs = (line.split() for line in self._read(files.stat).splitlines())
        return {name: int(value) for name, value in pairs}.get(files.inactive, 0)

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text(encoding="ascii").strip()
        except OSError:
            return ""
