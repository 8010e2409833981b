"""Labels: the canonical classes, and how each data set spells them."""

import re

COVID = "COVID-19"
NO_FINDING = "No finding"
PNEUMONIA = "Pneumonia"

# Folder names, as `normalize` leaves them.
FOLDER_LABELS: dict[str, str] = {
    "covid": COVID,
    "covid 19": COVID,
    "covid19": COVID,
    "no finding": NO_FINDING,
    "no findings": NO_FINDING,
    "normal": NO_FINDING,
    "bacterial pneumonia": PNEUMONIA,
    "pneumonia": PNEUMONIA,
    "viral pneumonia": PNEUMONIA,
}

# Terms of the `finding` column, as `normalize` leaves them. Later releases write paths such as
# `Pneumonia/Viral/COVID-19`. Terms that stand in no map (`todo`, `Unknown`, `ARDS`, which names a
# course and not a cause) leave an image without a label.
FINDING_LABELS: dict[str, str] = {
    "covid 19": COVID,
    "no finding": NO_FINDING,
    "aspergillosis": PNEUMONIA,
    "aspiration": PNEUMONIA,
    "bacterial": PNEUMONIA,
    "chlamydophila": PNEUMONIA,
    "e.coli": PNEUMONIA,
    "fungal": PNEUMONIA,
    "h1n1": PNEUMONIA,
    "herpes": PNEUMONIA,
    "influenza": PNEUMONIA,
    "klebsiella": PNEUMONIA,
    "legionella": PNEUMONIA,
    "lipoid": PNEUMONIA,
    "mers cov": PNEUMONIA,
    "mrsa": PNEUMONIA,
    "mycoplasma": PNEUMONIA,
    "mycoplasma bacterial pneumonia": PNEUMONIA,
    "nocardia": PNEUMONIA,
    "pneumocystis": PNEUMONIA,
    "pneumonia": PNEUMONIA,
    "sars": PNEUMONIA,
    "staphylococcus": PNEUMONIA,
    "streptococcus": PNEUMONIA,
    "varicella": PNEUMONIA,
    "viral": PNEUMONIA,
}


def normalize(name: str) -> str:
    """Lower case, with runs of spaces, hyphens and underscores as one space."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def folder_label(name: str) -> str:
    """Canonical label of a class folder; a name that is not known stays as it is."""
    return FOLDER_LABELS.get(normalize(name), name)


def finding_label(finding: str) -> str | None:
    """Canonical label of a `finding`, or None where it names none of the classes.

    A list or path of findings is COVID-19 as soon as one of its terms is.
    """
    terms = (normalize(term) for term in re.split("[,/]", finding))
    labels = {FINDING_LABELS[term] for term in terms if term in FINDING_LABELS}
    return min(labels, key=(COVID, PNEUMONIA, NO_FINDING).index, default=None)
