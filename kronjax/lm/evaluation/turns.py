"""Timing of two ways to do the same thing, in turns.

The time of a program may differ by a third from run to run, and on a shared machine
from minute to minute. So the two ways run in turns, medians are reported, and a winner
is named only if both quartiles of the ratios agree on it.

>>> Times((1.0, 2.0, 3.0), (2.0, 4.0, 3.3)).ratio
0.5
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

TIE = 0.02
"""Relative difference of times below which neither way counts as faster."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of a model and of the same model with dense layers, measured in turns.

    Attributes:
        samples: Seconds of the model in each turn.
        dense_samples: Seconds with dense layers; equal to `samples` for a dense model.
    """

    samples: tuple[float, ...]
    dense_samples: tuple[float, ...]

    def __repr__(self) -> str:
        """Return the medians, without the samples."""
        return (
            f"Times(seconds={self.seconds:.4g}, dense_seconds={self.dense_seconds:.4g},"
            f" ratio={self.ratio:.4g}, turns={len(self.samples)})"
        )

    @property
    def seconds(self) -> float:
        """Median time of the model, in seconds."""
        return float(np.median(self.samples))

    @property
    def dense_seconds(self) -> float:
        """Median time with dense layers, in seconds."""
        return float(np.median(self.dense_samples))

    @property
    def ratio(self) -> float:
        """Median over turns of the model's time divided by that of dense layers."""
        return float(np.median(self._ratios))

    @property
    def winner(self) -> str | None:
        """The faster one, `model` or `dense`, or None if the samples do not tell."""
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
    """Time one or two functions in turns, in alternating order.

    Args:
        calls: Functions that run once and return their seconds; the second is the
            dense one. With `least`, they take the number of runs, `calls`, and return
            the mean.
        repeats: Number of turns, after an initial one that warms the caches.
        least: Least duration of a sample in seconds, for the resolution of the clock.
    """
    first = [call() for call in calls]
    options: dict[str, int] = {}
    if least is not None:
        options["calls"] = min(max(math.ceil(least / max(*first, 1e-9)), 1), 200)
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats):
        # The second call finds the caches as the first one has left them.
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            samples[i].append(calls[i](**options))
    return Times(tuple(samples[0]), tuple(samples[-1]))
