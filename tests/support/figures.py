"""Figures that a test run prints at its end."""

figures: list[str] = []


def report(scenario: str, text: str) -> None:
    """Keep a line for the end of the run."""
    figures.append(f"{scenario}: {text}")
