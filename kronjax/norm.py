"""The norms in which errors are minimised.

A `Norm` is a Schatten p-norm with p = 2 (Frobenius), `2^{j+1} + 2` for j = 0 … 11, or
infinity (spectral). A stage of a solve is identified by its number of squarings j, see
`linalg.schatten`; j = -1 stands for p = 2. The spectral norm has no stage of its own:
it is the limit of rising p. Importing this module does not load jax.

Adding a norm takes two files: a module in `linalg` that computes value and gradient
by matrix products, and this one, for its name, stages, cost and closed form. If it is a
limit of stages, as the spectral norm is, `solver.continuation.finish` is the third.

>>> norm = Norm.parse("schatten:18")
>>> norm.p, norm.squarings, norm.stages("fixed"), str(norm)
(18.0, 3, (0, 1, 3), 'schatten:18')
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

    from kronjax.kronecker import Configuration

MAX_SQUARINGS = 11
"""The largest exponent in use is p = 4098: beyond it float32 has no digits left."""

EXPONENTS = {2: -1} | {2 ** (j + 1) + 2: j for j in range(MAX_SQUARINGS + 1)}
"""All finite exponents p, ascending, and the squarings that give them."""

NAMES = {"spectral": math.inf, "frobenius": 2.0}
"""Norms that have a name, and their exponents."""

FIXED = (0, 1, 3, 5, 7, 9, 11)
"""Stages of the fixed schedule: p = 4, then 6 and four times as much at every stage, up
to 4098."""

ADAPTIVE = tuple(range(MAX_SQUARINGS + 1))
"""Stages of the adaptive schedule: p about doubles at every stage, and each matrix ends
where it is good enough."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """A Schatten p-norm that can be minimised.

    Args:
        p: The exponent: 2, `2^{j+1} + 2` for j = 0 … 11, or infinity.

    Raises:
        ValueError: If there is no such norm; names the exponents and the nearest one.
    """

    p: float

    def __post_init__(self) -> None:
        """Check the exponent."""
        object.__setattr__(self, "p", float(self.p))
        if not self.is_spectral:
            _squarings(self.p)

    @classmethod
    def parse(cls, norm: "str | float | Norm") -> "Norm":
        """Return the norm for "spectral", "frobenius", "schatten:P", or an exponent.

        Raises:
            ValueError: If there is no such norm; lists the norms and names the nearest.
        """
        if isinstance(norm, Norm):
            return norm
        text = str(norm)
        if text in NAMES:
            return cls(NAMES[text])
        try:
            p = float(text.removeprefix("schatten:"))
        except ValueError:
            close = difflib.get_close_matches(text, [*NAMES, "schatten:P"], n=1)
            guess = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f'norm must be "spectral", "frobenius" or "schatten:P" with P = '
                f"{_listed()}; got {norm!r}.{guess}"
            ) from None
        return cls(p)

    @classmethod
    def for_weights(cls, norm: "str | float | Norm", has_weights: bool) -> "Norm":
        """Return the norm of a rule, where "auto" depends on the weights.

        It stands for Frobenius where the error is weighted, and for spectral where it
        is not.
        """
        if norm == "auto":
            norm = "frobenius" if has_weights else "spectral"
        return cls.parse(norm)

    def __str__(self) -> str:
        """Return the word that `parse` takes and recipes hold."""
        for name, p in NAMES.items():
            if p == self.p:
                return name
        return f"schatten:{self.p:g}"

    @property
    def is_spectral(self) -> bool:
        """Whether this is the spectral norm, p = inf."""
        return self.p == math.inf

    @property
    def is_frobenius(self) -> bool:
        """Whether this is the Frobenius norm, p = 2."""
        return self.p == 2

    @property
    def squarings(self) -> int:
        """The last stage: that of p itself; for the spectral norm the largest."""
        return MAX_SQUARINGS if self.is_spectral else _squarings(self.p)

    def is_adaptive(self, schedule: str | Sequence[float]) -> bool:
        """Return whether stages are predicted, and the last ones left out."""
        by_name = isinstance(schedule, str) and schedule == "adaptive"
        return self.is_spectral and by_name

    def stages(
        self,
        schedule: str | Sequence[float] = "adaptive",
        *,
        starts_at_frobenius: bool = True,
    ) -> tuple[int, ...]:
        """Return the squarings of all stages, ascending.

        Args:
            schedule: "adaptive" (for other norms than the spectral one the same as
                "fixed"), "fixed", or rising exponents p > 2.
            starts_at_frobenius: Whether the start solves p = 2 already; if not, that
                is the first stage.

        Raises:
            ValueError: If there is no such schedule.
        """
        ladder = _ladder(schedule, self.is_adaptive(schedule))
        last = ladder[-1] if self.is_spectral else self.squarings
        # Without a closed form p = 2 is a stage like any other.
        ladder = ladder if starts_at_frobenius else (-1, *ladder)
        return tuple(j for j in ladder if j < last) + (last,) * (last >= ladder[0])

    def has_closed_form(
        self,
        shape: tuple[int, int],
        configurations: "Sequence[Configuration]",
        weighted: tuple[bool, ...] = (False, False),
    ) -> bool:
        """Return whether one singular value decomposition gives the nearest sum.

        It does for one configuration alone that is low rank on each side where it has
        to be, which is to say that one of its factors has a single row, or column: on
        the weighted sides for the Frobenius norm, on both for the others.

        Args:
            shape: `(m, n)` of the matrix.
            configurations: The configurations of the sum.
            weighted: Whether rows and columns have weights.
        """
        first, *rest = configurations
        sides = zip(first.a_shape, first.b_shape(shape), weighted, strict=True)
        return not rest and all(
            m1 == 1 or m2 == 1
            for m1, m2, has_weight in sides
            if has_weight or not self.is_frobenius
        )

    def num_products(self, squarings):
        """Return the cost of one value and gradient at a stage.

        Args:
            squarings: The stage, an integer, may be traced.

        Returns:
            Number of products of the size of `EᵀE`, a jax integer.
        """
        from kronjax.linalg import schatten

        return schatten.num_products(squarings)

    def value_and_gradient(
        self, matrix: "jax.Array", squarings
    ) -> "tuple[jax.Array, jax.Array]":
        """Return `½‖E‖_p²` and its gradient at a stage: `schatten.value_and_gradient`.

        Args:
            matrix: `E`, `[m, n]`, float32 or float64.
            squarings: The stage, an integer, may be traced.
        """
        from kronjax.linalg import schatten

        return schatten.value_and_gradient(matrix, squarings)


def _squarings(p: float) -> int:
    """Return the squarings that give a finite exponent."""
    if p in EXPONENTS:
        return EXPONENTS[p]
    nearest = ""
    if math.isfinite(p):
        nearest = f"; the nearest is {min(EXPONENTS, key=lambda x: abs(x - p))}"
    raise ValueError(
        f"Schatten p-norms are available for p = {_listed()}, and infinity (spectral); "
        f"got p = {p:g}{nearest}."
    )


def _ladder(schedule, is_adaptive):
    """Return the squarings of a schedule by name, or of its exponents."""
    if isinstance(schedule, str) and schedule in ("adaptive", "fixed"):
        return ADAPTIVE if is_adaptive else FIXED
    exponents = () if isinstance(schedule, str) else map(float, schedule)
    ladder = tuple(map(_squarings, exponents))
    if not ladder or ladder[0] < 0 or list(ladder) != sorted(set(ladder)):
        raise ValueError(
            'schedule must be "adaptive", "fixed", or rising exponents p > 2 such as '
            f"[4, 18, 258]; got {schedule!r}."
        )
    return ladder


def _listed():
    return ", ".join(map(str, EXPONENTS))
