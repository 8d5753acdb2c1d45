"""A time limit for everything, split over steps; what one leaves is shared by those after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class Budget:
    """``seconds`` in all; each step's share is by its weight among the steps still to come.

    >>> budget = Budget(100.0, {"a": 1, "b": 1, "c": 2}, clock=lambda: 0.0)
    >>> budget.share("a"), budget.share("c")  # b is skipped: what it was to have goes to c
    (25.0, 100.0)
    """

    def __init__(
        self,
        seconds: float,
        weights: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._names, self._weights = list(weights), dict(weights)

    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._end - self._clock())

    def share(self, name: str) -> float:
        """Seconds that the step ``name`` may take now."""
        coming = self._names[self._names.index(name) :]
        return self.left() * self._weights[name] / sum(self._weights[n] for n in coming)
