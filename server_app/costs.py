"""What the coordinator's own work costs: seconds and memory."""

import resource
import time


class Stopwatch:
    """The seconds of each phase of a round, and of all together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """End ``phase``, which began where the one before it ended."""
        now = time.monotonic()
        self.seconds[phase] = round_seconds(now - self._last)
        self._last = now

    @property
    def total(self) -> float:
        """All phases that have ended."""
        return sum(self.seconds.values())


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def round_seconds(seconds: float) -> float:
    """Seconds to the millisecond."""
    return float(f"{seconds:.3f}")
