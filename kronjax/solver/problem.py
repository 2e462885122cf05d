"""What is static about a solve: configurations, norm, stages and budgets.

A problem is hashable and holds no arrays. Its schedule is the list of all stages: the
race, in which every start goes through the first few, and then the rest, for which the
best of them goes on. One stage after the other keeps the race as small in memory, and
in compiled code, as a single start.

>>> from kronjax.kronecker import Configuration
>>> problem = Problem.of((36, 36), Configuration((6, 6), 3), "schatten:6", starts=2)
>>> [(stage.squarings, stage.origin.name) for stage in problem.schedule()]
[(0, 'START'), (0, 'START'), (1, 'CHAMPION')]
"""

import dataclasses
import enum
import math
from collections.abc import Sequence

import jax

from kronjax.kronecker import Configuration
from kronjax.norm import Norm

SLICES = 8
"""At most so many parts has the only stage of a problem that `is_flat`."""


_FROBENIUS = Norm(2)


class Origin(enum.IntEnum):
    """Where a stage takes its points from."""

    BEFORE = 0
    START = 1
    CHAMPION = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stage:
    """One entry of a schedule; arrays `[stages]` when stacked.

    Attributes:
        squarings: `j`, which sets p.
        budget: Products of the size of `EᵀE` that may be spent.
        origin: `Origin`: where the stage takes its points from.
        begins: Number of the start that begins here, or -1.
        ends: Whether a start ends here, to be compared with the champion.
        final: Whether the solution may be good enough here already.
    """

    squarings: int | jax.Array
    budget: int | jax.Array
    origin: int | jax.Array
    begins: int | jax.Array
    ends: bool | jax.Array
    final: bool | jax.Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static about one problem; hashable, with ranks capped.

    Attributes:
        shape: `(m, n)` of the matrix.
        configurations: What to look for.
        norm: The norm of the error.
        squarings: The stages, ascending; empty where the start is the solution.
        is_adaptive: Whether stages are predicted, and the last ones left out.
        starts: Starts in the race.
        budget: Products of the size of `EᵀE` per stage.
    """

    shape: tuple[int, int]
    configurations: tuple[Configuration, ...]
    norm: Norm
    squarings: tuple[int, ...]
    is_adaptive: bool
    starts: int
    budget: int

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        configuration: Configuration | Sequence[Configuration],
        norm: float | str | Norm = "spectral",
        starts: int = 4,
        budget: int | None = None,
        weighted: tuple[bool, ...] = (False, False),
        schedule: str | Sequence[float] = "adaptive",
    ) -> "Problem":
        """Check the arguments of `solve` and fill in what they leave open.

        `weighted` says whether rows and columns have weights.
        """
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"solve takes one matrix [m, n] with entries; got shape "
                f"{tuple(shape)}. Use jax.vmap or kronjax.approximate for a batch."
            )
        if isinstance(configuration, Configuration):
            configuration = (configuration,)
        if not configuration:
            raise ValueError("solve needs at least one Configuration; got none.")
        for one in configuration:
            if not isinstance(one, Configuration):
                raise ValueError(
                    "solve takes a Configuration((m1, n1), rank=r), or several; got "
                    f"{one!r}."
                )
        _refuse_duplicates(configuration, shape)
        for name, number in (("starts", starts), ("budget", budget)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1; got {number}.")
        size = shape[0], shape[1]
        norm = Norm.parse(norm)
        adaptive = norm.is_adaptive(schedule)
        stages = norm.stages(
            schedule,
            starts_at_frobenius=_FROBENIUS.has_closed_form(
                size, configuration, weighted
            ),
        )
        # At p = 2 evaluations are cheap, and half-converged weighted fits are poor.
        default = default_budget(size, adaptive) * (6 if stages == (-1,) else 1)
        return cls(
            shape=size,
            configurations=tuple(
                Configuration(c.a_shape, min(c.rank, c.max_rank(size)))
                for c in configuration
            ),
            norm=norm,
            squarings=stages,
            is_adaptive=adaptive,
            starts=starts,
            budget=budget or default,
        )

    @property
    def is_spectral(self) -> bool:
        """Whether the norm is the spectral one."""
        return self.norm.is_spectral

    @property
    def is_flat(self) -> bool:
        """Whether p = 2 is all there is, and has no closed form."""
        return self.squarings == (-1,)

    @property
    def is_factored(self) -> bool:
        """Whether the unknowns are factors, not points of the manifold: see `factored`.

        At p = 2 a gradient is hardly more than one product with a weight. For larger p
        it has at least two of the size of `EᵀE`, and orthonormal bases have to cost
        most of another one: where they are cheaper they are worth their price, for
        factors take more products: 4 % more of 72 matrices of OPT-125M's shapes at half
        their parameters, solved to 3e-2, and 20 % more of four random 48×48 of rank 12,
        solved to 2e-4.
        """
        m, n = max(self.shape), min(self.shape)
        size = sum(
            one.rank**2 * (math.prod(one.a_shape) + math.prod(one.b_shape(self.shape)))
            for one in self.configurations
        )
        is_costly = 4 * 7 * size >= 3 * m * n**2
        return self.is_flat or (bool(self.squarings) and is_costly)

    @property
    def num_race_stages(self) -> int:
        """Stages in which every start takes part: not the last, unless it is alone."""
        stages = len(self.squarings)
        race = 4 if self.is_adaptive else 3
        return min(race, max(stages - 1, 1), stages) if self.starts > 1 else 0

    def schedule(self) -> list[Stage]:
        """Return all stages in order: every start's part of the race, then the rest.

        The winner always has a stage of its own: one that is alone is run again.
        """
        race = self.squarings[: self.num_race_stages]
        rest = self.squarings[len(race) :] or self.squarings[-1:]
        # One long stage in slices, that its progress may be seen.
        slices = min(SLICES, -(-self.budget // 100)) if self.is_flat else 1
        share = self.budget // self.starts
        stages = []
        for start in range(self.starts if race else 0):
            for j in race:
                begins = j == race[0]
                stages.append(
                    Stage(
                        squarings=j,
                        budget=share,
                        origin=Origin.START if begins else Origin.BEFORE,
                        begins=start if begins else -1,
                        ends=j == race[-1],
                        final=False,
                    )
                )
        for index, j in enumerate(rest * slices):
            first = Origin.CHAMPION if race else Origin.START
            begins = index == 0
            stages.append(
                Stage(
                    squarings=j,
                    budget=-(-self.budget // slices),
                    origin=first if begins else Origin.BEFORE,
                    begins=0 if begins and not race else -1,
                    ends=False,
                    final=self.is_adaptive,
                )
            )
        return stages


def _refuse_duplicates(configurations, shape):
    m, n = shape
    # A column times a row is a row times a column, and so with a matrix and a number.
    # For one column all four are the same: the later entries of the mapping win.
    same = {(m, n): (1, 1), (1, 1): (1, 1)} | dict.fromkeys([(1, n), (m, 1)], (m, 1))
    seen = {}
    for one in configurations:
        key = same.get(one.a_shape, one.a_shape)
        if key in seen:
            raise ValueError(
                f"{one} and {seen[key]} express the same sums: write one "
                f"Configuration({one.a_shape}, rank={one.rank + seen[key].rank})."
            )
        seen[key] = one


def parse_norm(norm: float | str) -> float:
    """Return the exponent of a norm."""
    return Norm.parse(norm).p


def default_budget(shape: tuple[int, int], adaptive: bool = False) -> int:
    """Return the products per stage: 1,000 where they are cheap, falling to 165.

    The adaptive schedule has more of them, and falls to 100.
    """
    return max(100 if adaptive else 165, min(1000, 100_000 // min(shape)))
