"""Published figures on image collections that this package reads, and what they differ in."""

from collections.abc import Collection
from typing import NamedTuple


class PublishedFigure(NamedTuple):
    """One published accuracy.

    Attributes:
        model: name of the model.
        source: data set, as the manifest's column `source` names it.
        accuracy: lowest and highest published value, 0 to 1.
        year: of the publication.
        reference: where it was published.
        differs: what its evaluation does differently from a split by patient.
    """

    model: str
    source: str
    accuracy: tuple[float, float]
    year: int
    reference: str
    differs: str


PUBLISHED = (
    PublishedFigure(
        model="DarkCovidNet",
        source="ozturk",
        accuracy=(0.8702, 0.8702),
        year=2020,
        reference="Ozturk et al., Computers in Biology and Medicine 121:103792",
        differs="Three classes, 5-fold by image, not by patient: images of one patient stand in "
        "training and test. A network trained end to end; no intervals. About the same images: "
        "the collection has grown since.",
    ),
    PublishedFigure(
        model="CoroNet",
        source="ozturk",
        accuracy=(0.896, 0.902),
        year=2020,
        reference="Khan et al., Computer Methods and Programs in Biomedicine 196:105581",
        differs="By image, not by patient. Xception, fine-tuned end to end, first on another "
        "collection with further images of pneumonia; no intervals.",
    ),
)


def published_on(sources: Collection[str]) -> tuple[PublishedFigure, ...]:
    """Published figures on exactly these sources.

    A figure on one collection says nothing about a mixture that contains it, so that a merged
    manifest has none.
    """
    return tuple(figure for figure in PUBLISHED if set(sources) == {figure.source})
