"""What the container's memory looks like to Prometheus."""

from pathlib import Path

from cxr_server.memory import ContainerMemory


def values(folder: Path) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in ContainerMemory(folder).collect()
        for sample in family.samples
    }


def test_working_set_leaves_the_cache_out(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\nactive_file 100\n")
    (tmp_path / "memory.max").write_text("2000\n")
    assert values(tmp_path) == {
        "cxr_memory_working_set_bytes": 600,
        "cxr_memory_limit_bytes": 2000,
    }


def test_no_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert values(tmp_path) == {"cxr_memory_working_set_bytes": 900}


def test_no_cgroup(tmp_path: Path) -> None:
    assert values(tmp_path / "nothing") == {}


def test_version_1(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.usage_in_bytes").write_text("900\n")
    (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 300\n")
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert values(tmp_path) == {"cxr_memory_working_set_bytes": 600}
    (folder / "memory.limit_in_bytes").write_text("2000\n")
    assert values(tmp_path)["cxr_memory_limit_bytes"] == 2000
