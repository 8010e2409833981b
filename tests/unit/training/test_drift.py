"""The reference that drift is measured against."""

from pathlib import Path

import numpy as np
import pytest

from cxr.config import Distribution, load_config
from cxr.drift import bin_of, summaries
from cxr.engine import Engine
from cxr_training.data import build_manifest, generate_phantoms
from cxr_training.drift import distribution, with_reference
from cxr_training.errors import TrainingError
from support.bundles import make_bundle


def psi(reference: Distribution, values: np.ndarray) -> float:
    """The population stability index, as the chart's rules make it."""
    bins = len(reference.shares)
    counts = np.bincount([bin_of(value, reference.edges) for value in values], minlength=bins)
    found = (counts + 0.5) / (len(values) + 0.5 * bins)
    return float(((found - reference.shares) * np.log(found / reference.shares)).sum())


def test_equal_images_have_no_drift_and_darker_ones_have() -> None:
    rng = np.random.default_rng(0)
    reference = distribution(rng.normal(size=300))
    assert reference.images == 300
    assert len(reference.shares) == 10
    assert psi(reference, rng.normal(size=2000)) < 0.1
    assert psi(reference, rng.normal(0.3, size=2000)) > 0.05
    assert psi(reference, rng.normal(1.0, size=2000)) > 0.25


@pytest.mark.parametrize(("values", "bins"), [([0.0] * 20, 2), ([0.0] * 15 + [1.0] * 5, 3)])
def test_equal_deciles_are_one_edge(values: list[float], bins: int) -> None:
    reference = distribution(np.asarray(values))
    assert len(reference.shares) == bins
    assert sum(reference.shares) == pytest.approx(1)
    assert psi(reference, np.asarray(values * 20)) < 0.1
    assert psi(reference, np.full(400, 2.0)) > 0.25


def test_a_bin_holds_its_upper_edge() -> None:
    assert [bin_of(value, (0.2, 0.4)) for value in (0.1, 0.2, 0.3, 0.4, 0.5)] == [0, 0, 1, 1, 2]


def test_the_reference_is_what_the_bundle_answers(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", guarded=True, reference=None)
    data = generate_phantoms(
        tmp_path / "phantoms", patients_per_class=3, seed=2, size_range=(96, 128)
    )
    frame = build_manifest([data], progress=False).frame
    engine = Engine(bundle)
    config = with_reference(load_config(bundle), engine, frame)
    assert config.reference is not None
    answers = [engine.predict([Path(path).read_bytes()])[0] for path in frame["path"]]
    for name, reference in config.reference.items():
        assert reference.images == len(frame)
        values = np.asarray([summaries(answer)[name] for answer in answers])
        assert psi(reference, values) == pytest.approx(0, abs=1e-9)
    assert {"probability of COVID-19", "too_dark", "out_of_distribution"} <= set(config.reference)
    broken = frame.assign(path=str(tmp_path / "none"))
    Path(broken["path"].iloc[0]).write_bytes(b"no image")
    with pytest.raises(TrainingError, match="refuses an image"):
        with_reference(load_config(bundle), engine, broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shares": [0.5, 0.5]}, "one entry more"),
        ({"edges": [0.5, 0.2]}, "ascend"),
        ({"shares": [0.5, 0.4, 0.2]}, "sum"),
        ({"shares": [0.5, 0.5, 0.0]}, "greater than 0"),
    ],
)
def test_a_distribution_that_is_none_is_refused(change: dict[str, object], message: str) -> None:
    valid = {"edges": [0.2, 0.5], "shares": [0.5, 0.3, 0.2], "images": 9}
    Distribution.model_validate(valid)
    with pytest.raises(ValueError, match=message):
        Distribution.model_validate(valid | change)
