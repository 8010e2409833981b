"""Labels: from a data set's words to a canonical finding, and from that to a task's class.

The words stand in `labels.yaml`, beside this module.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import yaml

from cxr_training.data.errors import DataError

_DOCUMENT = yaml.safe_load(resources.files(__package__).joinpath("labels.yaml").read_text("utf-8"))

# Canonical findings, the one that counts most first, with the names that mean them.
FINDINGS: Mapping[str, list[str]] = _DOCUMENT["findings"]
_FINDING_OF = {name: finding for finding, names in FINDINGS.items() for name in names}

COVID, NO_FINDING, PNEUMONIA = "COVID-19", "No finding", "Pneumonia"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is to tell apart.

    Attributes:
        label_of: canonical finding to class.
        keeps_others: whether a finding without a canonical name is a class of its own.
    """

    label_of: Mapping[str, str]
    keeps_others: bool

    def label(self, finding: str) -> str | None:
        """The class of a finding, or None where the task has none for it."""
        known = finding in FINDINGS
        return self.label_of.get(finding, None if known or not self.keeps_others else finding)


TASKS: Mapping[str, Task] = {
    name: Task(
        label_of={
            finding: label for label, findings in task["classes"].items() for finding in findings
        },
        keeps_others=task["others"] == "keep",
    )
    for name, task in _DOCUMENT["tasks"].items()
}
DEFAULT_TASK = "three-class"


def find_task(name: str) -> Task:
    """A task by its name.

    Raises:
        DataError: there is no such task.
    """
    if name not in TASKS:
        raise DataError(f"Unknown task '{name}'; choose {', '.join(TASKS)}.")
    return TASKS[name]


def normalize(name: str) -> str:
    """Lower case, with runs of spaces, hyphens and underscores as one space."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def folder_finding(name: str) -> str:
    """Canonical finding of a class folder; a name that is not known stays as it is."""
    return _FINDING_OF.get(normalize(name), name)


def text_finding(text: str) -> str | None:
    """Canonical finding of a metadata cell, or None where it names none.

    A cell may hold a list or path of findings (`COVID-19, ARDS`, `Pneumonia/Viral/COVID-19`); the
    one that stands first in `FINDINGS` counts.
    """
    terms = (normalize(term) for term in re.split("[,/]", text))
    found = {_FINDING_OF[term] for term in terms if term in _FINDING_OF}
    return min(found, key=list(FINDINGS).index, default=None)
