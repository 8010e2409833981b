"""The reference that serving measures drift against: answers to images of the validation split.

Not of the training split: a model knows those, and is surer of them than of any that it will meet.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from cxr.config import Distribution, ModelConfig
from cxr.drift import bin_of, summaries
from cxr.engine import CONFIG_FILE, Engine
from cxr.errors import BadImageError
from cxr_training.errors import TrainingError

_IMAGES = 300
_BINS = 10
# Images added to each bin, so that none is impossible (Krichevsky and Trofimov, IEEE Trans. Inf.
# Theory 1981;27:199-207).
_PRIOR = 0.5


def with_reference(config: ModelConfig, engine: Engine, validation: pd.DataFrame) -> ModelConfig:
    """The configuration with the distributions of the numbers of :mod:`cxr.drift`.

    Args:
        config: a bundle's.
        engine: that bundle, which gives the answers.
        validation: rows of a manifest; of many, some are chosen, by the seed of the training data.

    Raises:
        TrainingError: an image cannot be used.
    """
    seed = config.training_data.seed
    rows = validation.sample(n=min(_IMAGES, len(validation)), random_state=seed)
    found: dict[str, list[float]] = {}
    for path in rows["path"]:
        (answer,) = engine.predict([Path(path).read_bytes()])
        if isinstance(answer, BadImageError):
            raise TrainingError(f"The bundle refuses an image of the validation split: {answer}")
        for name, value in summaries(answer).items():
            found.setdefault(name, []).append(value)
    reference = {name: distribution(np.asarray(values)) for name, values in found.items()}
    return config.model_copy(update={"reference": reference})


def write_config(config: ModelConfig, bundle: Path) -> None:
    """Write a bundle's configuration."""
    (bundle / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")


def distribution(values: npt.NDArray[np.float64]) -> Distribution:
    """Shares of numbers between their deciles, or fewer bins where deciles are equal.

    Args:
        values: float64 `[images]`.
    """
    deciles = np.quantile(values, np.arange(1, _BINS) / _BINS)
    # Rounded, so that the last digits of a machine's arithmetic change nothing.
    edges = tuple(dict.fromkeys(float(f"{edge:.6g}") for edge in deciles))
    bins = len(edges) + 1
    counts = np.bincount([bin_of(value, edges) for value in values], minlength=bins)
    shares = (counts + _PRIOR) / (len(values) + _PRIOR * bins)
    return Distribution(edges=edges, shares=tuple(shares.tolist()), images=len(values))
