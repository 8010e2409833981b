"""What can be chosen about a head."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# Inverse L2 strengths, half a decade apart; the best lies inside for a hundred images and for
# a hundred thousand.
LOGISTIC_GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SVM_GRID = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
RBF_GRID = (0.3, 1.0, 3.0, 10.0, 30.0)

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LogisticSettings(_Settings):
    """Multinomial logistic regression on standardised features.

    Attributes:
        c: inverse L2 strengths to choose from.
    """

    kind: Literal["logistic"] = "logistic"
    c: Annotated[tuple[Positive, ...], Field(min_length=1)] = LOGISTIC_GRID


class SvmSettings(_Settings):
    """Linear support vector machines, one class against the rest, on standardised features.

    Their distances become probabilities by one common scale and a shift for each class, fitted on
    images that the machines had not seen (Platt's method, for several classes).

    Attributes:
        c: costs of an error to choose from.
    """

    kind: Literal["svm"] = "svm"
    c: Annotated[tuple[Positive, ...], Field(min_length=1)] = SVM_GRID


class RbfSettings(_Settings):
    """Support vector machines with a Gaussian kernel, one class against the rest.

    The kernel's `gamma` is scikit-learn's `scale`: on standardised features, one over their number.
    Calibrated as :class:`SvmSettings` are.

    Attributes:
        c: costs of an error to choose from.
    """

    kind: Literal["rbf"] = "rbf"
    c: Annotated[tuple[Positive, ...], Field(min_length=1)] = RBF_GRID


class SoftmaxSettings(_Settings):
    """A linear layer and a softmax on standardised features, trained by gradient descent.

    Attributes:
        optimizer: `sgd` (momentum 0.9) or `adam`.
        learning_rate: step size.
        weight_decay: strength of the L2 penalty.
        batch_size: images in one step.
        epochs: numbers of passes over the images to choose from.
    """

    kind: Literal["softmax"] = "softmax"
    optimizer: Literal["sgd", "adam"] = "adam"
    learning_rate: Positive = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Count = 20
    epochs: Annotated[tuple[Count, ...], Field(min_length=1)] = (2, 4, 8, 16, 32)


class TreeSettings(_Settings):
    """A decision tree.

    Attributes:
        leaf: smallest numbers of images in a leaf to choose from.
    """

    kind: Literal["tree"] = "tree"
    leaf: Annotated[tuple[Count, ...], Field(min_length=1)] = (2, 5, 10, 20, 40)


class ForestSettings(_Settings):
    """AdaBoost of random forests.

    Attributes:
        boosts: forests, each one heeding the images that those before got wrong.
        trees: trees in one forest.
        depth: largest depth of a tree.
    """

    kind: Literal["forest"] = "forest"
    boosts: Count = 10
    trees: Count = 50
    depth: Count = 4


class AverageSettings(_Settings):
    """The mean of several heads' probabilities.

    Attributes:
        members: the heads.
    """

    kind: Literal["average"] = "average"
    members: Annotated[tuple["HeadSettings", ...], Field(min_length=2)]


HeadSettings = Annotated[
    LogisticSettings
    | SvmSettings
    | RbfSettings
    | SoftmaxSettings
    | TreeSettings
    | ForestSettings
    | AverageSettings,
    Field(discriminator="kind"),
]

AverageSettings.model_rebuild()

_WORDS = {
    "logistic": "standardised multinomial logistic regression, folded into one linear layer",
    "svm": "standardised linear support vector machines with calibrated probabilities, folded into "
    "one linear layer",
    "rbf": "standardised support vector machines with a Gaussian kernel and calibrated "
    "probabilities",
    "softmax": "standardised linear layer and softmax, trained by gradient descent",
    "tree": "decision tree",
    "forest": "AdaBoost of random forests",
    "finetuned": "linear layer and softmax, trained together with the network",
}
HEAD_KINDS = ("logistic", "svm", "rbf", "softmax", "tree", "forest", "average")


def describe(kind: str, members: tuple["HeadSettings", ...] = ()) -> str:
    """A head's kind in words, for the model's configuration."""
    if kind == "average":
        parts = "; ".join(describe(m.kind, getattr(m, "members", ())) for m in members)
        return f"mean of the probabilities of {len(members)} heads ({parts})"
    return _WORDS[kind]
