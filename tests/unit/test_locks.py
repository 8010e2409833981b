"""requirements/*.txt pin what pyproject.toml asks for; `make lock` keeps them in step."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAME = PROJECT["project"]["name"]
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
# Per lock: the extras that it installs.
LOCKS = {
    "portal": ("portal", "lambda", "tracing"),
    "serving": ("serving", "tracing"),
    "torchserve": ("torchserve", "tracing"),
    "training": ("training", "spark", "notebook"),
    "loadtest": ("loadtest",),
    "dev": tuple(EXTRAS),
}


def pins(lock: str) -> list[Requirement]:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return [Requirement(line) for line in lines]


def direct(lock: str) -> Iterator[Requirement]:
    """The requirements that pyproject.toml states for a lock's environment."""
    stated = [*PROJECT["project"]["dependencies"]]
    stated += [f"{NAME}[{','.join(LOCKS[lock])}]"]
    if lock == "dev":
        stated += PROJECT["dependency-groups"]["dev"]
    yield from _spelled_out(stated)


def _spelled_out(stated: list[str]) -> Iterator[Requirement]:
    for requirement in map(Requirement, stated):
        if requirement.name == NAME:
            for extra in requirement.extras:
                yield from _spelled_out(EXTRAS[extra])
        else:
            yield requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_every_direct_dependency_is_pinned_within_its_bounds(lock: str) -> None:
    versions: dict[str, list[Version]] = {}
    for pin in pins(lock):
        (specifier,) = pin.specifier
        versions.setdefault(canonicalize_name(pin.name), []).append(Version(specifier.version))
    for requirement in direct(lock):
        pinned = versions.get(canonicalize_name(requirement.name))
        assert pinned, f"{requirement} is not in requirements/{lock}.txt; run `make lock`"
        for version in pinned:
            assert version in requirement.specifier, (
                f"{requirement} does not allow {version} of requirements/{lock}.txt; "
                "run `make lock`"
            )


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_is_an_exact_public_pin(lock: str) -> None:
    for pin in pins(lock):
        # An epoch may come first: 1!2.0.
        assert re.fullmatch(r"==([0-9]+!)?[0-9][0-9a-z.]*", str(pin.specifier)), pin
        assert pin.url is None


@pytest.mark.parametrize("lock", LOCKS)
def test_cuda_is_left_to_the_cuda_build_of_torch(lock: str) -> None:
    names = {canonicalize_name(pin.name) for pin in pins(lock)}
    assert ("torch" in names) == (lock not in {"loadtest", "portal", "serving"})
    assert not {name for name in names if name.startswith(("nvidia-", "cuda-"))}
    assert "triton" not in names


@pytest.mark.parametrize(
    ("lock", "overridden"),
    [
        ("portal", set()),
        ("serving", set()),
        ("torchserve", {"torch"}),
        ("training", set()),
        ("loadtest", set()),
    ],
)
def test_what_is_deployed_is_what_was_tested(lock: str, overridden: set[str]) -> None:
    tested = {(pin.name, str(pin.specifier)) for pin in pins("dev")}
    assert {
        pin.name for pin in pins(lock) if (pin.name, str(pin.specifier)) not in tested
    } == overridden


@pytest.mark.parametrize("lock", ["portal", "serving", "torchserve"])
def test_serving_installs_no_training_library(lock: str) -> None:
    names = {canonicalize_name(pin.name) for pin in pins(lock)}
    assert not names & {"pandas", "scikit-learn", "scipy", "matplotlib", "pyarrow", "onnx"}
