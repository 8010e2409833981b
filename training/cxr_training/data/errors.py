"""The error that every function of this package raises for data it cannot use."""


class DataError(ValueError):
    """Data that cannot be used. The message is one sentence that names what to change."""
