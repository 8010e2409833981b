"""A small phantom set, shared by these tests."""

from pathlib import Path

import pandas as pd
import pytest

from cxr_training.data import build_manifest, generate_phantoms


@pytest.fixture(scope="session")
def frame(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder: Path = generate_phantoms(
        tmp_path_factory.mktemp("phantoms"),
        patients_per_class=8,
        seed=3,
        images_per_patient=(1, 1),
        size_range=(96, 128),
    )
    return build_manifest([folder], progress=False).frame
