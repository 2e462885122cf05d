"""The static part of a solve: configurations, norm, stages and budgets.

A problem is hashable and holds no arrays. Its schedule is the list of all stages: first
the race, in which every start passes through the first few stages, then the remaining
stages for the best start. Because stages run one after the other, the race needs no
more memory, and no more compiled code, than a single start.

>>> from kronjax.kronecker import Configuration
>>> problem = Problem.of((36, 36), Configuration((6, 6), 3), "schatten:6", num_starts=2)
>>> [(stage.squarings, stage.origin.name) for stage in problem.schedule()]
[(0, 'START'), (0, 'START'), (1, 'CHAMPION')]
"""

import dataclasses
import enum
from collections.abc import Sequence

import jax

from kronjax.kronecker import Configuration
from kronjax.norm import Norm

SLICES = 8
"""Largest number of parts of the only stage of a problem that `is_least_squares`."""

_FROBENIUS = Norm(2)


class Origin(enum.IntEnum):
    """The points from which a stage begins."""

    PREVIOUS = 0
    START = 1
    CHAMPION = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stage:
    """An entry of a schedule; when stages are stacked, fields are arrays `[stages]`.

    Attributes:
        squarings: Number of squarings `j`, which determines p.
        max_products: Largest number of products of the size of `EᵀE`.
        origin: `Origin`: the points from which the stage begins.
        begins: Number of the start that begins with this stage, or -1.
        ends: Whether a start ends with this stage and is compared with the champion.
        final: Whether the solve may end with this stage.
    """

    squarings: int | jax.Array
    max_products: int | jax.Array
    origin: int | jax.Array
    begins: int | jax.Array
    ends: bool | jax.Array
    final: bool | jax.Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static part of a solve; hashable, with capped ranks.

    Attributes:
        shape: Shape `(m, n)` of the matrix.
        configurations: The configurations of the sum.
        norm: The norm of the error.
        squarings: Squarings of the stages, ascending; empty if the start is the
            solution.
        is_adaptive: Whether stages are predicted, and the last ones left out.
        num_starts: Number of starts in the race.
        max_products: Largest number of products of the size of `EᵀE` per stage.
    """

    shape: tuple[int, int]
    configurations: tuple[Configuration, ...]
    norm: Norm
    squarings: tuple[int, ...]
    is_adaptive: bool
    num_starts: int
    max_products: int

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        configuration: Configuration | Sequence[Configuration],
        norm: float | str | Norm = "spectral",
        num_starts: int = 4,
        max_products: int | None = None,
        weighted: tuple[bool, ...] = (False, False),
        schedule: str | Sequence[float] = "adaptive",
    ) -> "Problem":
        """Check the arguments of `solve` and fill in the defaults.

        `weighted` tells whether rows and columns have weights.
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
        for entry in configuration:
            if not isinstance(entry, Configuration):
                raise ValueError(
                    "solve takes a Configuration((m1, n1), rank=r), or several; got "
                    f"{entry!r}."
                )
        _refuse_duplicates(configuration, shape)
        for name, number in (
            ("num_starts", num_starts),
            ("max_products", max_products),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1; got {number}.")
        size = shape[0], shape[1]
        norm = Norm.parse(norm)
        adaptive = norm.is_adaptive(schedule)
        solved = _FROBENIUS.has_closed_form(size, configuration, weighted)
        stages = norm.stages(schedule, starts_at_frobenius=solved)
        # At p = 2 products are cheap, and half-converged weighted fits are poor.
        default = default_max_products(size, adaptive) * (6 if stages == (-1,) else 1)
        return cls(
            shape=size,
            configurations=tuple(
                Configuration(c.a_shape, min(c.rank, c.max_rank(size)))
                for c in configuration
            ),
            norm=norm,
            squarings=stages,
            is_adaptive=adaptive,
            num_starts=num_starts,
            max_products=max_products or default,
        )

    @property
    def is_least_squares(self) -> bool:
        """Whether p = 2 is the only stage."""
        return self.squarings == (-1,)

    @property
    def is_factored(self) -> bool:
        """Whether the unknowns are factors instead of points of the manifold.

        See `factored`. At p = 2 a gradient costs hardly more than a product with a
        weight. For larger p it costs at least two products of the size of `EᵀE`, and
        factors are used if orthonormal bases cost most of another one. Cheaper bases
        are worth their price, because factors take more products: 4 % more on 72
        matrices of OPT-125M's shapes at half their parameters, solved to 3e-2, and 20 %
        more on four random 48×48 of rank 12, solved to 2e-4.
        """
        m, n = max(self.shape), min(self.shape)
        size = sum(c.rank * c.num_parameters(self.shape) for c in self.configurations)
        is_costly = 4 * 7 * size >= 3 * m * n**2
        return self.is_least_squares or (bool(self.squarings) and is_costly)

    @property
    def num_race_stages(self) -> int:
        """Number of stages of every start: all but the last one, if there are others.

        At most three, or four with the adaptive schedule; zero for a single start.
        """
        stages = len(self.squarings)
        race = 4 if self.is_adaptive else 3
        return min(race, max(stages - 1, 1), stages) if self.num_starts > 1 else 0

    def schedule(self) -> list[Stage]:
        """Return all stages in order: every start's part of the race, then the rest.

        The winner always has a stage of its own: a single stage is run again.
        """
        race = self.squarings[: self.num_race_stages]
        rest = self.squarings[len(race) :] or self.squarings[-1:]
        # A single long stage is cut into slices that show its progress.
        slices = (
            min(SLICES, -(-self.max_products // 100)) if self.is_least_squares else 1
        )
        share = self.max_products // self.num_starts
        stages = []
        for start in range(self.num_starts if race else 0):
            for j in race:
                begins = j == race[0]
                stages.append(
                    Stage(
                        squarings=j,
                        max_products=share,
                        origin=Origin.START if begins else Origin.PREVIOUS,
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
                    max_products=-(-self.max_products // slices),
                    origin=first if begins else Origin.PREVIOUS,
                    begins=0 if begins and not race else -1,
                    ends=False,
                    final=self.is_adaptive,
                )
            )
        return stages


def _refuse_duplicates(configurations, shape):
    m, n = shape
    # A column times a row is a row times a column; likewise a matrix times a number.
    # In a matrix with one column all four are the same: later entries take precedence.
    same = {(m, n): (1, 1), (1, 1): (1, 1)} | dict.fromkeys([(1, n), (m, 1)], (m, 1))
    seen = {}
    for configuration in configurations:
        a_shape, rank = configuration.a_shape, configuration.rank
        key = same.get(a_shape, a_shape)
        if key in seen:
            raise ValueError(
                f"{configuration} and {seen[key]} express the same sums: write one "
                f"Configuration({a_shape}, rank={rank + seen[key].rank})."
            )
        seen[key] = configuration


def default_max_products(shape: tuple[int, int], adaptive: bool = False) -> int:
    """Return the products per stage: 1,000 where they are cheap, falling to 165.

    The adaptive schedule has more stages; its budget falls to 100.
    """
    return max(100 if adaptive else 165, min(1000, 100_000 // min(shape)))
