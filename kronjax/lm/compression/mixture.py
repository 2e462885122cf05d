"""Sizes of mixtures: low rank beside Kronecker terms of a near-square shape.

A mixture is a pair of ranks `(columns times rows, near-square terms)`; the shape of the
kernel decides the shapes of the terms.

>>> near_square((12, 12))
(3, 4)
>>> mix((12, 12), 0.5, 0.5)
(2, 1)
"""

import math

from kronjax.kronecker import Configuration, divisors


def near_square(shape: tuple[int, int]) -> tuple[int, int] | None:
    """Return the shape of left factors with the fewest parameters in a term.

    Ties are broken in favour of factors that are most alike in rows and in columns. The
    result is None where only low rank is possible: sizes that are prime.
    """
    m, n = shape
    if m > n:
        turned = near_square((n, m))
        return None if turned is None else (turned[1], turned[0])
    trivial = {(m, 1), (1, n), (m, n), (1, 1)}

    def size(pair):
        m1, n1 = pair
        d1, d2 = m1 * n1, m * n // (m1 * n1)
        uneven = abs(math.log(m1 * m1 / m)) + abs(math.log(n1 * n1 / n))
        return d1 + d2, uneven, pair

    pairs = {(m1, n1) for m1 in divisors(m) for n1 in divisors(n)}
    return min(pairs - trivial, key=size, default=None)


def mix(shape: tuple[int, int], fraction: float, share: float) -> tuple[int, int]:
    """Return the ranks of a mixture of a size.

    Args:
        shape: `(n_in, n_out)`.
        fraction: Parameters over those of the dense kernel.
        share: Fraction of the parameters that low rank gets.

    Returns:
        The rank of the low-rank part, and the number of near-square terms.
    """
    m, n = shape
    low, *square = _largest(shape, 1.0)
    budget = fraction * m * n
    first = min(round(share * budget / (m + n)), low.rank)
    left = budget - first * (m + n)
    if not square:
        return first, 0
    size = Configuration(square[0].a_shape, 1).num_parameters(shape)
    return first, max(0, min(int(left / size), square[0].rank))


def configurations(
    shape: tuple[int, int], ranks: tuple[int, int]
) -> tuple[Configuration, ...]:
    """Return the configurations of a mixture, without those of rank 0."""
    pairs = zip(((shape[0], 1), near_square(shape)), ranks, strict=True)
    return tuple(Configuration(a, rank) for a, rank in pairs if a and rank)


def _largest(shape, fraction):
    """Return configurations of low rank and, if possible, of near-square terms.

    Each has the largest rank within a fraction of the dense kernel.
    """
    m, n = shape
    budget = fraction * m * n
    largest = []
    for a_shape in ((m, 1), near_square(shape)):
        if a_shape is not None:
            term = Configuration(a_shape, 1)
            most = max(int(budget / term.num_parameters(shape)), 1)
            largest.append(Configuration(a_shape, min(most, term.max_rank(shape))))
    return tuple(largest)
