"""A model that was trained on the GPU, and the phantoms that it was trained on."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

CXR = str(Path(sys.executable).with_name("cxr"))


def cxr(*words: object, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run a `cxr` command."""
    return subprocess.run([CXR, *map(str, words)], check=check, text=True, capture_output=not check)


@dataclass(frozen=True)
class Trained:
    """A run and what was made of it."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def manifest(self) -> Path:
        return self.run / "manifest.parquet"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def archive(self) -> Path:
        return self.folder / "cxr.mar"

    @property
    def images(self) -> list[bytes]:
        """Of the test split, which no step of training has seen."""
        frame = pd.read_parquet(self.manifest)
        paths = frame[frame["split"] == "test"]["path"]
        return [Path(path).read_bytes() for path in paths]


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "images"
    cxr("data", "phantoms", folder, "--patients-per-class", 20, "--seed", 0)
    return folder


@pytest.fixture(scope="session")
def train(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    def trained(*words: object) -> Trained:
        made = Trained(tmp_path_factory.mktemp("trained"))
        cache = made.folder / "cache"
        cxr("train", "--data", phantoms, "--out", made.run, "--cache", cache, *words)
        cxr("export", made.run, "--out", made.bundle)
        cxr("archive", made.bundle, "--out", made.archive)
        return made

    return trained


@pytest.fixture(scope="session")
def trained(train: Callable[..., Trained]) -> Trained:
    """The demo's model."""
    return train("--recipe", "lite0-frozen")
