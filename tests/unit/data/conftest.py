"""Small made-up data sets, drawn once for the whole folder."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_training.data import generate_phantoms

MakeImage = Callable[[Path, int], Path]


@pytest.fixture(scope="session")
def phantom_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_phantoms(
        tmp_path_factory.mktemp("phantoms") / "tree",
        patients_per_class=6,
        seed=11,
        size_range=(160, 240),
    )


@pytest.fixture
def make_image() -> MakeImage:
    """Write a grey image with structure of its own for each number, and return its path."""

    def make(path: Path, number: int) -> Path:
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8))
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((160, 192), Image.Resampling.BICUBIC).save(path, quality=92)
        return path

    return make


@pytest.fixture
def write_csv() -> Callable[[Path, list[dict[str, object]]], None]:
    def write(path: Path, rows: list[dict[str, object]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    return write
