"""The shortcut audit: does the model look at the lungs, and can it see where an image comes from?

After Maguolo and Nanni (A critic evaluation of methods for COVID-19 automatic detection from X-ray
images, 2020), who blanked the lungs out and still got high accuracy on merged public collections,
and DeGrave, Janizek and Lee (AI for radiographic COVID-19 detection selects shortcuts over signal,
2021).

The lungs are not segmented: boxes cover them, the same for every image. A segmentation finds less
lung where the lung is white, so that the shape of its mask would give the class away; a fixed box
says nothing. On frontal radiographs of the public sets, :data:`BLANKED` holds both lungs whole and
:data:`KEPT` nearly all of them, with a part of heart, shoulder and abdomen. Neither fits a lateral,
a rotated or a loosely collimated image.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cxr.config import Interval
from cxr.decode import decode
from cxr.errors import BadImageError
from cxr_training.errors import TrainingError
from cxr_training.evaluation import bootstrap_figures, figure_interval

SHORTCUTS_FILE = "shortcuts.json"

Box = tuple[float, float, float, float]
View = Literal["original", "blanked", "only_lungs"]
Predict = Callable[[Sequence[Image.Image]], npt.NDArray[np.floating]]
Features = Callable[[Sequence[Image.Image]], npt.NDArray[np.floating]]

# Left, top, right, bottom, as shares of width and height.
BLANKED: tuple[Box, ...] = ((0.04, 0.05, 0.96, 0.90),)
KEPT: tuple[Box, ...] = ((0.08, 0.12, 0.47, 0.80), (0.53, 0.12, 0.92, 0.80))
VIEWS: tuple[View, ...] = ("original", "blanked", "only_lungs")
# The same grey everywhere: an image's own mean would say something about it.
FILL = 128

FOLDS = 5
# Fewer independent images of a class do not fill the folds.
SMALLEST_SOURCE = 10
# Share of the margin over guessing that may remain without lungs before it is called a shortcut.
_PARTLY, _MOSTLY = 0.25, 0.6
_BATCH = 16


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ViewFigures(_Document):
    """Figures on one view of the images.

    Attributes:
        accuracy: of the model as it is.
        balanced_accuracy: of the model as it is.
        retrained: balanced accuracy of a linear classifier on the backbone's features, trained and
            tested on this view by cross-validation; `None` where that was not asked for, or a
            class has fewer than two groups. It shows what there is to learn, where the model as
            it is may merely be confused.
    """

    accuracy: Interval
    balanced_accuracy: Interval
    retrained: Interval | None


class SourceReadability(_Document):
    """How well the source can be read from the features, within one label.

    Attributes:
        label: the class that all these images share.
        sources: images by source; groups that span sources are left out.
        balanced_accuracy: of a cross-validated linear classifier that keeps groups in one fold.
        chance: what guessing reaches.
    """

    label: str
    sources: dict[str, int]
    balanced_accuracy: Interval
    chance: float


class ShortcutAudit(_Document):
    """The content of `shortcuts.json`.

    Attributes:
        split: the images that were looked at.
        chance: balanced accuracy of guessing.
        views: the images as they are, with the lungs blanked out, and with only the lungs left.
        sources: by label; empty where no label has images of two sources.
        verdict: what follows, in plain words, one sentence each.
    """

    split: str
    images: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)]
    chance: float
    views: dict[View, ViewFigures]
    sources: tuple[SourceReadability, ...]
    verdict: tuple[str, ...]


def masked(image: Image.Image, view: View) -> Image.Image:
    """One view of an image.

    Args:
        image: mode `L` or `RGB`.
        view: `original`, `blanked` (the lungs filled with grey) or `only_lungs` (all else).

    Returns:
        A new image of the same size and mode; `original` gives `image` itself.
    """
    if view == "original":
        return image
    fill = FILL if image.mode == "L" else (FILL,) * 3
    grey = Image.new(image.mode, image.size, fill)
    if view == "blanked":
        result = image.copy()
        for box in BLANKED:
            pixels = _pixels(box, image.size)
            result.paste(grey.crop(pixels), pixels)
        return result
    for box in KEPT:
        pixels = _pixels(box, image.size)
        grey.paste(image.crop(pixels), pixels)
    return grey


def audit_shortcuts(
    frame: pd.DataFrame,
    predict: Predict,
    labels: tuple[str, ...],
    *,
    seed: int,
    features: Features | None = None,
    sources: Sequence[SourceReadability] = (),
    split: str = "test",
) -> ShortcutAudit:
    """Ask a model about its test images without their lungs, and without all else.

    Args:
        frame: rows of the manifest that the model was not trained on.
        predict: images (mode `L` or `RGB`, in their original size) to `[images, classes]`.
        labels: class names, in the order of the columns.
        seed: of bootstrap and folds.
        features: images to `[images, features]`: the backbone. With it, a linear classifier is
            also trained on each view; that costs one more pass over each.
        sources: of :func:`source_readability`, for the record and the verdict.
        split: name of the split that `frame` is.

    Raises:
        TrainingError: an image cannot be used, or `frame` is empty or has one class only.
    """
    if frame["label"].nunique() < 2:  # noqa: PLR2004 - nothing to tell apart
        raise TrainingError("A shortcut audit needs images of at least two classes.")
    views = {
        view: _view_figures(frame, view, predict, labels, seed=seed, features=features)
        for view in VIEWS
    }
    chance = 1 / frame["label"].nunique()
    return ShortcutAudit(
        split=split,
        images=len(frame),
        groups=int(frame["group"].nunique()),
        chance=chance,
        views=views,
        sources=tuple(sources),
        verdict=_verdict(views, chance, sources),
    )


def source_readability(
    frame: pd.DataFrame, features: npt.NDArray[np.floating], *, seed: int
) -> tuple[SourceReadability, ...]:
    """How well a linear classifier reads the source from features, within each label.

    Within one label the disease cannot help, so what is above chance is acquisition, patients'
    make-up or file history. Only sources with at least :data:`SMALLEST_SOURCE` groups of that
    label count, and groups that span sources are left out: they are copies.

    Args:
        frame: the manifest.
        features: `[images, features]`, in its order.
        seed: of folds and bootstrap.
    """
    spanning = frame.groupby("group")["source"].transform("nunique") > 1
    found = []
    for label in sorted(frame["label"].unique()):
        here = ((frame["label"] == label) & ~spanning).to_numpy()
        groups = frame[here].groupby("source")["group"].nunique()
        usable = sorted(groups[groups >= SMALLEST_SOURCE].index)
        if len(usable) < 2:  # noqa: PLR2004 - nothing to tell apart
            continue
        here &= frame["source"].isin(usable).to_numpy()
        rows = frame[here].assign(label=frame.loc[here, "source"])
        counts = rows["label"].value_counts()
        found.append(
            SourceReadability(
                label=str(label),
                sources={str(name): int(counts[name]) for name in usable},
                balanced_accuracy=_linear_probe(rows, features[here], seed),
                chance=1 / len(usable),
            )
        )
    return tuple(found)


def read_audit(path: Path) -> ShortcutAudit | None:
    """Read `shortcuts.json`; `None` if there is no such file.

    Raises:
        TrainingError: the file is damaged or from another version.
    """
    try:
        return ShortcutAudit.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise TrainingError(f"{path} is damaged, or was written by another version.") from error


def _view_figures(
    frame: pd.DataFrame,
    view: View,
    predict: Predict,
    labels: tuple[str, ...],
    *,
    seed: int,
    features: Features | None,
) -> ViewFigures:
    # Cross-validation needs at least two groups of each class.
    if frame.groupby("label")["group"].nunique().min() < 2:  # noqa: PLR2004
        features = None
    answers, vectors = [], []
    for start in range(0, len(frame), _BATCH):
        images = [
            masked(_image(Path(path)), view) for path in frame["path"].iloc[start : start + _BATCH]
        ]
        answers.append(predict(images))
        if features is not None:
            vectors.append(features(images))
    values, replicates = bootstrap_figures(frame, np.concatenate(answers), labels, seed=seed)
    figures = {
        name: figure_interval(name, values[name], replicates[name])
        for name in ("accuracy", "balanced_accuracy")
    }
    return ViewFigures.model_validate(
        figures | {"retrained": _linear_probe(frame, np.concatenate(vectors), seed)}
        if vectors
        else figures | {"retrained": None}
    )


def _linear_probe(frame: pd.DataFrame, features: npt.NDArray[np.floating], seed: int) -> Interval:
    """Balanced accuracy of a cross-validated linear classifier of `label`; groups stay together."""
    truth = frame["label"].to_numpy(dtype=str)
    classes = tuple(str(name) for name in np.unique(truth))
    groups = frame["group"].to_numpy(dtype=str)
    folds = min(FOLDS, *(len(np.unique(groups[truth == name])) for name in classes))
    probabilities = np.zeros((len(frame), len(classes)))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    # These matrices are small: threads of the linear algebra cost more than they bring.
    with threadpool_limits(1):
        for training, test in splitter.split(features, truth, groups):
            # Strong regularisation: thousands of features stand against hundreds of images.
            model = make_pipeline(
                StandardScaler(), LogisticRegression(C=1e-3, class_weight="balanced", max_iter=2000)
            ).fit(features[training], truth[training])
            columns = [classes.index(str(name)) for name in model.classes_]
            probabilities[np.ix_(test, columns)] = model.predict_proba(features[test])
    values, replicates = bootstrap_figures(frame, probabilities, classes, seed=seed)
    interval = figure_interval(
        "balanced_accuracy", values["balanced_accuracy"], replicates["balanced_accuracy"]
    )
    assert interval is not None  # noqa: S101 - defined for any image
    return interval


def _verdict(
    views: dict[View, ViewFigures], chance: float, sources: Sequence[SourceReadability]
) -> tuple[str, ...]:
    figures = {name: row.retrained or row.balanced_accuracy for name, row in views.items()}
    trained = views["blanked"].retrained is not None
    who = "A classifier trained on images without lungs" if trained else "Without lungs, the model"
    original, blanked = figures["original"], figures["blanked"]
    margin = original.value - chance
    remaining = (blanked.value - chance) / margin if margin > 0 else 0.0
    without = (
        f"{who} reaches a balanced accuracy of {blanked.value:.2f} ({blanked.low:.2f} to "
        f"{blanked.high:.2f}); with lungs it is {original.value:.2f}, by guessing {chance:.2f}."
    )
    if original.low <= chance:
        verdict = "With the lungs in view the classes are hardly told apart, so nothing follows."
    elif blanked.low <= chance:
        verdict = "No shortcut was found outside the lungs; this test cannot find one inside them."
    elif remaining >= _MOSTLY:
        verdict = (
            f"Shortcuts explain most of what is measured: {remaining:.0%} of the margin over "
            "guessing needs no lung. Do not read the accuracy as a finding of disease."
        )
    elif remaining >= _PARTLY:
        verdict = (
            f"Shortcuts explain a part of what is measured: {remaining:.0%} of the margin over "
            "guessing needs no lung."
        )
    else:
        verdict = (
            f"Little of what is measured ({remaining:.0%} of the margin over guessing) can be had "
            "without lungs."
        )
    return (verdict, without, *_source_verdict(sources))


def _source_verdict(sources: Sequence[SourceReadability]) -> tuple[str, ...]:
    if not sources:
        return (
            "Whether the features tell the source cannot be measured here: no class has enough "
            "images of two sources.",
        )
    return tuple(
        f"Among images labelled {row.label}, the features tell {' from '.join(row.sources)} with a "
        f"balanced accuracy of {row.balanced_accuracy.value:.2f} "
        f"({row.balanced_accuracy.low:.2f} to {row.balanced_accuracy.high:.2f}; "
        f"{row.chance:.2f} by guessing): "
        + (
            "the model can see where an image comes from."
            if row.balanced_accuracy.low > row.chance
            else "no better than guessing."
        )
        for row in sources
    )


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    return (
        round(box[0] * width),
        round(box[1] * height),
        round(box[2] * width),
        round(box[3] * height),
    )


def _image(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise TrainingError(f"Cannot read an image of the manifest: {error.strerror}.") from error
    except BadImageError as error:
        raise TrainingError(f"An image of the manifest cannot be used: {error}") from error
