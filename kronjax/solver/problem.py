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
from kronjax.linalg import schatten

FIXED = (0, 1, 3, 5, 7, 9, 11)
"""p = 4, then 6 and four times as much at every stage, up to 4098."""

ADAPTIVE = tuple(range(schatten.MAX_SQUARINGS + 1))
"""p about doubles at every stage, and each matrix ends where it is good enough."""


SLICES = 8
"""At most so many parts has the only stage of a problem that `is_flat`."""


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
        squarings: The stages, ascending; empty where the start is the solution.
        is_spectral: Whether the last stage stands for p = inf.
        is_adaptive: Whether stages are predicted, and the last ones left out.
        starts: Starts in the race.
        budget: Products of the size of `EᵀE` per stage.
    """

    shape: tuple[int, int]
    configurations: tuple[Configuration, ...]
    squarings: tuple[int, ...]
    is_spectral: bool
    is_adaptive: bool
    starts: int
    budget: int

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        configuration: Configuration | Sequence[Configuration],
        norm: float | str = "spectral",
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
        p = parse_norm(norm)
        last = schatten.MAX_SQUARINGS if p == math.inf else schatten.squarings_for(p)
        # Without a closed form p = 2 is a stage like any other.
        closed = _has_closed_form(size, configuration, weighted)
        adaptive = p == math.inf and schedule == "adaptive"
        ladder = _ladder(schedule, adaptive)
        if p == math.inf:
            last = ladder[-1]
        stages = ladder if closed else (-1, *ladder)
        stages = tuple(j for j in stages if j < last) + (last,) * (last >= stages[0])
        # At p = 2 evaluations are cheap, and half-converged weighted fits are poor.
        default = default_budget(size, adaptive) * (6 if stages == (-1,) else 1)
        return cls(
            shape=size,
            configurations=tuple(
                Configuration(c.a_shape, min(c.rank, c.max_rank(size)))
                for c in configuration
            ),
            squarings=stages,
            is_spectral=p == math.inf,
            is_adaptive=adaptive,
            starts=starts,
            budget=budget or default,
        )

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


def _ladder(schedule, adaptive):
    """Return the squarings of a schedule by name, or of its exponents."""
    if isinstance(schedule, str) and schedule in ("adaptive", "fixed"):
        return ADAPTIVE if adaptive else FIXED
    found = () if isinstance(schedule, str) else schedule
    ladder = tuple(map(schatten.squarings_for, found))
    if not ladder or ladder[0] < 0 or list(ladder) != sorted(set(ladder)):
        raise ValueError(
            'schedule must be "adaptive", "fixed", or rising exponents p > 2 such as '
            f"[4, 18, 258]; got {schedule!r}."
        )
    return ladder


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


def _has_closed_form(shape, configurations, weighted):
    """Whether the start is the solution for p = 2.

    It is for one configuration alone, and under weights of a side only if it is low
    rank there: one of its factors has a single row, or column.
    """
    first = configurations[0]
    sides = zip(first.a_shape, first.b_shape(shape), weighted, strict=True)
    low_rank = (m1 == 1 or m2 == 1 for m1, m2, weight in sides if weight)
    return len(configurations) == 1 and all(low_rank)


def parse_norm(norm: float | str) -> float:
    """Return the exponent p for "spectral", "frobenius", "schatten:P", or a number."""
    names = {"spectral": math.inf, "frobenius": 2.0}
    try:
        text = str(norm)
        return names[text] if text in names else float(text.removeprefix("schatten:"))
    except ValueError:
        raise ValueError(
            f'norm must be "spectral", "frobenius" or "schatten:P"; got {norm!r}.'
        ) from None


def default_budget(shape: tuple[int, int], adaptive: bool = False) -> int:
    """Return the products per stage: 1,000 where they are cheap, falling to 165.

    The adaptive schedule has more of them, and falls to 100.
    """
    return max(100 if adaptive else 165, min(1000, 100_000 // min(shape)))
