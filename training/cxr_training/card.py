"""The model card: what a model is, what it was made from, and what it is worth, in Markdown.

It answers the items of CLAIM, the Checklist for Artificial Intelligence in Medical Imaging, in its
2024 update (Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300), by number, and
names those that training alone cannot answer.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from cxr.config import Interval, ModelConfig
from cxr_training.folds import CV_FILE, LOSO_FILE, FoldSummary, read_folds
from cxr_training.runs import Run, is_current
from cxr_training.shortcuts import SHORTCUTS_FILE, ShortcutAudit, read_audit

_TEMPLATE = "model_card.md.j2"
# Characters that would end a table's cell or begin markup.
_MARKUP = str.maketrans({character: f"\\{character}" for character in "\\|<>*_`[]#"})


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a run folder holds beside the model, and the card quotes.

    Attributes:
        folds: cross-validation, the summary to quote first.
        sources_out: leave-one-source-out, likewise.
        audit: of shortcuts.
        parted: groups that stand in more than one split, as in a split by image.
        unknown: images whose patient is not known.
    """

    parted: int = 0
    unknown: int = 0
    folds: tuple[FoldSummary, ...] = ()
    sources_out: tuple[FoldSummary, ...] = ()
    audit: ShortcutAudit | None = None


def card_facts(folder: Path) -> CardFacts:
    """Read `cv.json`, `loso.json` and `shortcuts.json` of a run folder.

    What is older than the run itself belongs to an earlier one, and is left out.

    Raises:
        TrainingError: one of them is damaged or from another version.
    """
    fresh = {
        name: folder / name
        for name in (CV_FILE, LOSO_FILE, SHORTCUTS_FILE)
        if is_current(folder / name)
    }
    return CardFacts(
        folds=read_folds(fresh[CV_FILE]) if CV_FILE in fresh else (),
        sources_out=read_folds(fresh[LOSO_FILE]) if LOSO_FILE in fresh else (),
        audit=read_audit(fresh[SHORTCUTS_FILE]) if SHORTCUTS_FILE in fresh else None,
    )


def model_card(config: ModelConfig, facts: CardFacts | None = None) -> str:
    """The model card in Markdown; the same input gives the same text.

    Args:
        config: the model's configuration.
        facts: of :func:`card_facts`; without them the card says that they are missing.
    """
    environment = Environment(
        loader=PackageLoader("cxr_training.report"),
        autoescape=False,  # noqa: S701 - Markdown; text of the user's goes through `text`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"interval": _interval, "text": _text}
    return environment.get_template(_TEMPLATE).render(
        config=config, metrics=config.metrics, data=config.training_data, facts=facts or CardFacts()
    )


def parted_groups(frame: pd.DataFrame) -> int:
    """Groups that stand in more than one split: 0, or the figures flatter the model."""
    return int((frame.groupby("group")["split"].nunique() > 1).sum())


def unknown_patients(frame: pd.DataFrame) -> int:
    """Images whose patient is not known, so that only likeness keeps them with their relatives."""
    return int(frame["patient"].isna().sum())


def intended_use(*, synthetic: bool) -> str:
    """What a model may be used for."""
    if synthetic:
        return (
            "Trying and testing the serving platform. The model was trained on synthetic phantoms "
            "and knows nothing of real radiographs: its answer to one is meaningless. Not a "
            "medical device."
        )
    return (
        "Research on, and comparison of, classifiers of frontal (PA or AP) chest radiographs of "
        "adults. Research use only: not a medical device, and not for diagnosis, triage or any "
        "decision about a patient."
    )


def limitations(run: Run) -> tuple[str, ...]:
    """What speaks against trusting a model, one sentence or two each."""
    if run.record.training_data.synthetic:
        return (
            "Trained on synthetic phantoms: no answer about a real radiograph means anything.",
            "The metrics describe phantoms, which are far easier to tell apart than patients.",
        )
    return (
        "Research use only; not a medical device; not validated in any clinic.",
        "Made for frontal radiographs of adults: lateral views, children, CT slices and images "
        "of anything else get an answer too, and it means nothing.",
        *_confounding(run.frame),
        "Public labels are noisy; those of the NIH collection were mined from reports and not "
        "read again from the images.",
        *_held_out(run.frame),
        "Thresholds and probabilities fit the class frequencies of the training data, not of any "
        "clinic: probabilities are not risks.",
    )


def _held_out(frame: pd.DataFrame) -> tuple[str, ...]:
    """What the test split keeps apart from training, and what it may not."""
    if parted_groups(frame):
        return ("Metrics come from held-out images of the same patients: they flatter the model.",)
    unknown = unknown_patients(frame)
    where = (
        f"Metrics come from held-out {'groups' if unknown else 'patients'} of the same sources; "
        "expect worse at another hospital, and look at the metrics per source."
    )
    if not unknown:
        return (where,)
    return (
        where,
        f"The patient of {unknown} of {len(frame)} images is not known: images of one patient that "
        "do not look alike may stand in training and test, and the metrics may flatter the model.",
    )


def _confounding(frame: pd.DataFrame) -> tuple[str, ...]:
    """Name what the table of labels by source shows, on top of what no table shows."""
    table = pd.crosstab(frame["source"], frame["label"])
    single = [str(source) for source, row in table.iterrows() if (row > 0).sum() == 1]
    general = (
        "Source and class are confounded in public collections: the model may partly read scanner, "
        "hospital or file history where it should read the lung."
    )
    if not single:
        return (general,)
    return (
        general,
        f"All images of these sources have one and the same label: {', '.join(single)}.",
    )


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "not defined"
    return f"{interval.value:.3f} ({interval.low:.2f} to {interval.high:.2f})"


def _text(value: object) -> str:
    return " ".join(str(value).split()).translate(_MARKUP)
