"""Settings of the solves of a run; without jax, for the command line.

>>> SolveSettings().tolerance
0.01
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class SolveSettings:
    """Settings of all solves of a run; they mean the same for every method.

    Each task adds its index to the seed. Without `max_products` the limit is chosen
    from the size of a matrix.

    Attributes:
        tolerance: Gap at which a fit is good enough: 0.01 is one per cent.
        num_starts: Number of starts of each fit; the best is taken to the end.
        seed: Seed of the perturbed starts.
        max_products: Matrix products that a stage of a fit may spend.
        schedule: "adaptive", "fixed", or rising exponents p.
    """

    tolerance: float = 1e-2
    num_starts: int = 1
    seed: int = 0
    max_products: int | None = None
    schedule: str | tuple[float, ...] = "adaptive"

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not 0 < self.tolerance < math.inf:
            raise ValueError(
                f"the tolerance is {self.tolerance}: it must be positive and finite"
            )
        for name in ("num_starts", "max_products"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}: it must be at least 1")
        if not isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", tuple(self.schedule))
