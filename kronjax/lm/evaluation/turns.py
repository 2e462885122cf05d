"""Two ways to do the same thing, timed in turns.

From one run to the next the same program may differ by a third, and on a shared machine
from one minute to the next. So the two take turns, medians are taken, and a winner is
named only where the quartiles of the ratios agree on one.

>>> Times((1.0, 2.0, 3.0), (2.0, 4.0, 3.3)).ratio
0.5
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

TIE = 0.02
"""Relative difference of times below which nobody is faster."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of two ways to do the same, taken in turns.

    Attributes:
        samples: Of the model as it is.
        dense_samples: With dense layers; the same where it has no others.
    """

    samples: tuple[float, ...]
    dense_samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median of the model as it is."""
        return float(np.median(self.samples))

    @property
    def dense_seconds(self) -> float:
        """Median with dense layers."""
        return float(np.median(self.dense_samples))

    @property
    def ratio(self) -> float:
        """Median of the ratios of turns: below one, the model as it is is faster."""
        return float(np.median(self._ratios))

    @property
    def winner(self) -> str | None:
        """`model` or `dense`, or None where this run cannot tell."""
        low, high = np.quantile(self._ratios, [0.25, 0.75])
        if high < 1 - TIE:
            return "model"
        return "dense" if low > 1 + TIE else None

    @property
    def _ratios(self) -> np.ndarray:
        return np.divide(self.samples, self.dense_samples)


def take_turns(
    calls: Sequence[Callable[..., float]], repeats: int, *, least: float | None = None
) -> Times:
    """Run one or two ways to do something in turns, in alternating order.

    Args:
        calls: Each runs once and returns its seconds; the second is the dense one.
            With `least`, each takes the number of runs and returns the mean.
        repeats: Number of turns, after one that warms caches and does not count.
        least: Seconds that a sample should last, so that the clock can tell.
    """
    first = [call() for call in calls]
    more: dict[str, int] = {}
    if least is not None:
        more["calls"] = min(max(math.ceil(least / max(*first, 1e-9)), 1), 200)
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats):
        # Whoever runs second finds the caches as the first has left them.
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            samples[i].append(calls[i](**more))
    return Times(tuple(samples[0]), tuple(samples[-1]))
