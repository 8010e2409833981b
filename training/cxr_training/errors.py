"""Errors of the training room."""


class TrainingError(ValueError):
    """Training, evaluation or export cannot go on; the message is one sentence for the user."""
