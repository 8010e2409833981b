"""How long each step of the start took: what a new replica costs before it can answer."""

import time
from enum import StrEnum

import psutil


class Phase(StrEnum):
    """The steps of a start, in order."""

    PROCESS = "process"
    VERIFY = "verify"
    RUNTIME = "runtime"
    LOAD = "load"
    WARM_UP = "warm_up"


class Startup:
    """A stopwatch from the start of this process until the service is first ready.

    Attributes:
        seconds: how long each step took, those that have ended.
    """

    def __init__(self) -> None:
        self._last: float = psutil.Process().create_time()
        self.seconds: dict[Phase, float] = {}

    def ended(self, phase: Phase) -> None:
        """Mark the end of a step, and the start of the next one; only its first end counts."""
        if phase in self.seconds:
            return
        now = time.time()
        self.seconds[phase] = max(0.0, now - self._last)
        self._last = now

    def __str__(self) -> str:
        steps = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s after the start of the process ({steps})"
