"""Heads: from features to class probabilities.

:mod:`cxr_training.head_settings` says what can be chosen, :func:`fit_head` fits it, and every
fitted head writes itself as nodes of an ONNX graph (:mod:`cxr_training.heads.graph`).
"""

from cxr_training.head_settings import HEAD_KINDS, HeadSettings, describe
from cxr_training.heads.base import Head, Selection
from cxr_training.heads.fit import balanced_weights, fit_head
from cxr_training.heads.fitted import (
    AverageHead,
    CalibratedHead,
    KernelHead,
    LinearHead,
    SlicedHead,
    TreeHead,
    head_from_state,
)

__all__ = [
    "HEAD_KINDS",
    "AverageHead",
    "CalibratedHead",
    "Head",
    "HeadSettings",
    "KernelHead",
    "LinearHead",
    "Selection",
    "SlicedHead",
    "TreeHead",
    "balanced_weights",
    "describe",
    "fit_head",
    "head_from_state",
]
