"""Guards: what tells a model that an image is not one it can judge, fitted with the model."""

from cxr_training.guards.fit import Guards, fit_guards, guards_from_state

__all__ = ["Guards", "fit_guards", "guards_from_state"]
