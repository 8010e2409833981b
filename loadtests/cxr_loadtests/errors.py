"""What a user of the load tests can get wrong."""


class LoadTestError(Exception):
    """The run cannot be made or judged; the message is one sentence for the user."""
