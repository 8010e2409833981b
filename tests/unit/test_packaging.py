"""What the wheel holds, and which way the arrows between its packages go."""

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import cxr

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "cxr",
    "cxr_archive",
    "cxr_client",
    "cxr_handlers",
    "cxr_loadtests",
    "cxr_portal",
    "cxr_server",
    "cxr_training",
}
ROOMS = ("training", "model_archive", "handlers", "server", "portal", "loadtests")


def test_images_are_built_with_every_package_of_the_wheel() -> None:
    """Without one, `cxr --help` in an image would fail on the commands that it registers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{package}" for package in packages} <= set(lines)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_our_packages_only(wheel: Path) -> None:
    top = {name.split("/")[0] for name in files(wheel)}
    assert top == PACKAGES | {f"cxr_serve-{cxr.__version__}.dist-info"}


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    inside = files(wheel)
    rooms = [ROOT, *(ROOT / room for room in ROOMS)]
    for room in rooms:
        for package in (room / name for name in PACKAGES if (room / name).is_dir()):
            for module in package.rglob("*.py"):
                assert module.relative_to(room).as_posix() in inside


def test_the_wheel_holds_what_the_packager_puts_into_archives(wheel: Path) -> None:
    inside = files(wheel)
    for name in ("cxr_archive/model-config.yaml", "cxr_handlers/cxr_handler.py", "cxr/engine.py"):
        assert name in inside


def test_console_script_and_metadata(wheel: Path) -> None:
    inside = files(wheel)
    info = f"cxr_serve-{cxr.__version__}.dist-info"
    assert "cxr = cxr.cli:main" in inside[f"{info}/entry_points.txt"].decode()
    assert f"{info}/licenses/LICENSE" in inside
    metadata = Parser().parsestr(inside[f"{info}/METADATA"].decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == cxr.__version__


def test_the_version_is_written_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == cxr.__version__


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
