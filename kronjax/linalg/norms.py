"""Certain lower and upper bounds of spectral norms, by matrix products.

Let `V` be k approximate leading right vectors, `G = MᵀM`, and `y ⟂ V`. Then

    ‖M (V a + y)‖² = Σ a_i a_j v_iᵀG v_j + 2 Σ a_i yᵀr_i + yᵀG y,    r_i = G v_i − V t_i

for any `t_i`, so that `‖M‖²` is at most the largest eigenvalue of the comparison matrix
`[[|v_iᵀG v_j|, ‖r_i‖], [‖r_j‖, d]]`, divided by `1 − ‖VᵀV − I‖`, where `d` bounds G on
the complement of V. Residuals enter squared and divided by a gap: a crude V and a crude
`d` give a fine bound. `V` comes from block Krylov spaces, and `d` from the Frobenius
norm of a Chebyshev polynomial of the deflated Gram matrix, formed by as few squarings
as suffice. The lower bound is `‖M v‖ / ‖v‖`. Every rounding error is bounded and
counted against the bounds, so that those of `norm_bounds` hold with certainty:
`γ_k ≤ k · eps` for sums of k products in any order, which leaves a factor of two for
accelerators that compose products from shorter ones.

References: Horn and Johnson (2013), for Collatz–Wielandt; Higham (2002), for rounding;
Musco and Musco (2015), for block Krylov spaces.

>>> import jax.numpy as jnp
>>> bounds = norm_bounds(jnp.diag(jnp.array([1.0, 5.0, 2.0])))
>>> bool(bounds.lower <= 5 <= bounds.upper), round(float(bounds.upper), 3)
(True, 5.0)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kronjax.linalg import batching

VECTORS = 16
"""Number of leading vectors that are split off."""

RESTARTS = 10
"""Largest number of Krylov spaces, of three blocks each."""

SQUARINGS = 8
"""Largest number of squarings: Chebyshev degree 256."""

BLOCK = 128
"""Number of terms that are added in one block where rounding must stay small."""


SHARES = 10
"""Number of ways to divide one error between two entries; the best is used."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Lower and upper bounds of a spectral norm.

    Attributes:
        lower: A scalar, at most `‖M‖_2`.
        upper: A scalar, at least `‖M‖_2`.
        vectors: `[min(m, n), k]`, leading singular vectors on the shorter side, which
            can serve as the `start` for a nearby matrix. For linear maps `[n, 1]`.
    """

    lower: jax.Array
    upper: jax.Array
    vectors: jax.Array


def norm_bounds(
    matrix: jax.Array, start: jax.Array | None = None, *, width: float = 1e-3
) -> Bounds:
    """Return a lower and an upper bound of `‖M‖_2`, both certain.

    They come within `width` of each other where the dtype allows it. In float32 that
    requires a largest singular value that stands out from the others, and a stable
    rank `‖M‖_F² / ‖M‖_2²` of at most two hundred; otherwise the bounds hold as well,
    but can be a few 1e-2 apart at worst (for an orthogonal matrix). In float64 there is
    no such limit.

    Args:
        matrix: `[m, n]`, float32 or float64; shorter dtypes are converted to float32.
            Subnormal entries count as zero, as in XLA.
        start: `[min(m, n), k]`, the `vectors` of a nearby matrix; random by default.
        width: The value of `(upper − lower) / lower` at which to stop.

    Returns:
        Bounds in the dtype of the computation; NaN where entries are not finite.

    Raises:
        ValueError: If the matrix is not `[m, n]` or is empty.

    Cost: `m n min(m, n)` multiplications for the smaller Gram matrix, `min(m, n)³` for
    each squaring: none for a spectrum that decays like `i^{-1/2}`, at most 8.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"matrix must be [m, n] and not empty; got {matrix.shape}. "
            "For a batch use jax.vmap or jax.lax.map."
        )
    if matrix.dtype != jnp.float64:
        matrix = matrix.astype(jnp.float32)
    m, n = max(matrix.shape), min(matrix.shape)
    largest = jnp.max(jnp.abs(matrix))
    finite = jnp.isfinite(largest)
    largest = jnp.where(finite & (largest > 0), largest, 1)
    scale = largest / (2 * jnp.frexp(largest)[0])
    # Without the barrier XLA scales the matrix again in every product that uses it.
    scaled = jax.lax.optimization_barrier(jnp.where(finite, matrix, 0) / scale)
    axis = 0 if matrix.shape[0] == m else 1
    gram = _sum_of_products(scaled, scaled, BLOCK, axis)
    tall = scaled.T if axis else scaled
    if start is None:
        key = jax.random.key(0)
        start = jax.random.normal(key, (n, min(VECTORS, n)), matrix.dtype)
    split = _split(gram, start.astype(matrix.dtype), width)
    lower, upper = _bounds(tall, gram, split, width)
    # If the norm overflows, the upper bound is infinite and the lower one is not.
    lower = jnp.minimum(lower * scale, float(jnp.finfo(matrix.dtype).max))
    is_nonzero, nan = jnp.any(matrix != 0), jnp.asarray(jnp.nan, matrix.dtype)
    lower, upper = (
        jnp.where(finite, jnp.where(is_nonzero, x, 0), nan)
        for x in (lower, upper * scale)
    )
    return Bounds(lower, upper, split.vectors)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Split:
    """Leading vectors of a Gram matrix.

    Attributes:
        vectors: `V`, `[n, k]`, orthonormal, best first.
        residuals: `G V − V diag(values)`, `[n, k]`.
        values: `[k]`, descending.
        beyond: A lower estimate of the largest eigenvalue on the complement.
        settled: Whether the vectors are good enough for the bounds.
    """

    vectors: jax.Array
    residuals: jax.Array
    values: jax.Array
    beyond: jax.Array
    settled: jax.Array


def _split(gram, start, width):
    """Return leading vectors of `gram`, accurate enough for bounds of this width."""
    k = start.shape[1]

    def project(basis):
        images = _mm(gram, basis)
        values, w = jnp.linalg.eigh(_mm(basis.T, images))
        values, w = values[::-1], w[:, ::-1]
        vectors = _mm(basis, w[:, :k])
        residuals = _mm(images, w[:, :k]) - vectors * values[None, :k]
        beyond = values[k] if values.size > k else jnp.zeros((), gram.dtype)
        # Half of the permitted width is left for rounding.
        goal = values[0] * (1 + width)
        load = jnp.sum(jnp.sum(residuals**2, axis=0) / _positive(goal - values[:k]))
        return _Split(
            vectors, residuals, values[:k], beyond, load <= (goal - beyond) / 4
        )

    def restart(split):
        r = _unit_columns(split.residuals)
        further = _unit_columns(_mm(gram, r))
        blocks = [split.vectors, r, further]
        return project(_orthonormal(jnp.concatenate(blocks, axis=1)))

    def unsettled(carry):
        return ~carry[0].settled & (carry[1] < RESTARTS)

    # A single block gives no estimate of the spectrum beyond it.
    first = restart(project(_orthonormal(start)))
    split, _ = jax.lax.while_loop(
        unsettled, lambda carry: (restart(carry[0]), carry[1] + 1), (first, 1)
    )
    return split


def _bounds(tall, gram, split, width):
    """Return both bounds for a matrix `[m, n]`, `m ≥ n`, of entries up to 2."""
    m, n = tall.shape
    v, k = split.vectors, split.vectors.shape[1]
    eps = float(jnp.finfo(tall.dtype).eps)
    fine = math.isqrt(n - 1) + 1
    size = _frobenius(gram)
    square_sum = jnp.trace(gram) * (1 + (n + _terms(m, BLOCK)) * eps)
    # Eight roundings for scaling the matrix, where a division is not exact.
    gram_error = (_terms(m, BLOCK) + 8) * eps * square_sum + eps * size
    overlaps = _sum_of_products(v, v, fine) - jnp.eye(k, dtype=v.dtype)
    own = _terms(n, fine) * eps
    # As long as `skew` is well below 1, `long` bounds every ‖v_i‖ and ‖V‖.
    skew = (_frobenius(overlaps) + k * own) * (1 + 2 * k * own)
    long = 1 + skew

    lower, top = _along(tall, v[:, 0], jnp.sqrt(square_sum), skew)
    # The mean of both products, since G is symmetric only up to rounding.
    z = (_sum_of_products(gram, v, fine) + _sum_of_products(gram, v.T, fine, 1)) / 2
    t = _sum_of_products(v, z, fine)
    r = z - _mm(v, t)
    product_error = 2 * own * size * long**2
    residual_error = product_error + (k + 2) * (1 + k**0.5) * eps * size * long**3
    rho = jnp.sqrt(jnp.sum(r**2, axis=0)) * (1 + n * eps) + residual_error
    deflated, deflated_error = _deflated(gram, v, z - _mm(v, t) / 2, size, long)
    compared = (jnp.abs(t) + jnp.abs(t.T)) / 2 + product_error
    compared = compared.at[0, 0].set(top)

    # If e is the error of G, 2 |a_1| e ‖z‖ ≤ e (s a_1² + ‖z‖² / s) for any s: several
    # are tried. The first diagonal entry itself has no such error.
    shares = 0.5 ** jnp.arange(SHARES, dtype=v.dtype)
    extra = jnp.tile((1 + 1 / shares)[:, None] * gram_error * long**2, (1, k + 1))
    extra = extra.at[:, 0].set(shares * gram_error * long)

    goal = (lower * (1 + 0.95 * width)) ** 2 * (1 - skew)
    room = _positive(goal - jnp.diag(compared)[None, :] - extra[:, :k])
    wanted = goal - extra[:, k] - jnp.sum(rho[None, :] ** 2 / room, axis=1)
    wanted = jnp.max(wanted) - deflated_error
    # If that is out of reach, a value clearly below the norm gives the best bound.
    wanted = jnp.where(wanted > split.beyond, wanted, (goal + split.beyond) / 2)
    d = jnp.maximum(_remainder(deflated, wanted, split.beyond) + deflated_error, 0)

    table = jnp.block([[compared, rho[:, None]], [rho[None, :], d[None, None]]])
    squares = jax.vmap(lambda x: _perron(table + jnp.diag(x)))(extra)
    square = jnp.min(squares) / _positive(1 - skew)
    plain = size + gram_error
    square = jnp.where(skew < 0.5, jnp.fmin(square, plain), plain)
    return lower, jnp.sqrt(square) * (1 + 8 * eps)


def _along(tall, v, frobenius, skew):
    """Return a lower bound of `‖M v‖ / ‖v‖` and an upper bound of `‖M v‖²`."""
    m, n = tall.shape
    eps = float(jnp.finfo(tall.dtype).eps)
    fine = math.isqrt(n - 1) + 1
    side = math.isqrt(m)
    image = _apply(tall, v, fine)
    image = _frobenius(jnp.pad(image, (0, -m % side)).reshape(-1, side))
    rounding = 4 * (side + 2) * eps
    # Four roundings for scaling the matrix, as above.
    error = (_terms(n, fine) + 4) * eps * frobenius * (1 + skew)
    lower = jnp.maximum(image * (1 - rounding) - error, 0)
    own = _sum_of_products(v[:, None], v[:, None], fine)[0, 0]
    length = jnp.sqrt(own * (1 + 2 * _terms(n, fine) * eps))
    return lower / length * (1 - 8 * eps), (image * (1 + rounding) + error) ** 2


def _deflated(gram, v, half, size, long):
    """Return `G − V Hᵀ − H Vᵀ`, which is G without V, and the norm of its rounding.

    For `y ⟂ V` and any H its quadratic form `yᵀG y` is the same.
    """
    k = v.shape[1]
    left, right = (jnp.concatenate(x, axis=1) for x in ((v, half), (half, v)))
    error = 2 * k**0.5 * _frobenius(half) * long + size
    error = (2 * k + 4) * float(jnp.finfo(gram.dtype).eps) * error
    return gram - _mm(left, right.T), error


def _remainder(deflated, wanted, estimate):
    """Return an upper bound of the norm of `deflated [n, n]`, at best `wanted`.

    With `X = 2 D / d_0 − I` and Chebyshev's `T_2q(X) = 2 T_q(X)² − I`, whose entries'
    errors are bounded, `‖T_q‖ ≤ √((1 + ‖T_2q‖ + error) / 2)` leads back from the last
    polynomial. Eigenvalues inside `[0, d_0]` contribute at most 1 each, after any
    number of squarings.
    """
    n = deflated.shape[0]
    eps = float(jnp.finfo(deflated.dtype).eps)
    _, plain = _largest(deflated)
    # One squaring is usually enough where all eigenvalues are inside.
    reach = (1 + ((1 + n**0.5 / 2) / 2) ** 0.5) / 2
    inside = _positive(jnp.maximum(estimate, 0.95 * wanted / reach))

    def unwound(errors, level, norm):
        def back(i, norm):
            i = SQUARINGS - 1 - i
            before = jnp.sqrt((1 + norm + errors[i]) / 2) * (1 + 4 * eps)
            return jnp.where(i < level, before, norm)

        return jax.lax.fori_loop(0, SQUARINGS, back, norm)

    def square(carry):
        x, norm, errors, level, bound = carry
        error = 2 * n * eps * norm**2
        x = _mm(2 * x.T, x) - jnp.eye(n, dtype=x.dtype)
        norm, largest = _largest(x)
        errors = errors.at[level].set(error + 2 * eps * (norm + n**0.5))
        level = level + 1
        outermost = unwound(errors, level, largest) + first_error
        return x, norm, errors, level, jnp.fmin(bound, inside * (1 + outermost) / 2)

    def unfinished(carry):
        _, norm, _, level, bound = carry
        return (bound > wanted) & (level < SQUARINGS) & jnp.isfinite(norm)

    def squarings():
        errors = jnp.zeros(SQUARINGS, deflated.dtype)
        return jax.lax.while_loop(unfinished, square, (x, norm, errors, 0, plain))[-1]

    x = deflated * (2 / inside) - jnp.eye(n, dtype=deflated.dtype)
    norm = _frobenius(x)
    first_error = 4 * eps * (norm + n**0.5)
    needed = batching.any_lane(plain > wanted)
    return jax.lax.cond(needed, squarings, lambda: plain) * (1 + 8 * eps)


def _largest(x):
    """Return upper bounds of `‖X‖_F` and of all `yᵀ X y` for unit y, for `[n, n]`.

    The latter is at most `μ + ‖X − μ I‖_F` for any μ, and smallest near the mean.
    """
    n = x.shape[0]
    norm = _frobenius(x)
    mean = jnp.trace(x) / n
    shifts = mean * jnp.linspace(0, 2, 9, dtype=x.dtype)
    squares = norm**2 + n * shifts * (shifts - 2 * mean)
    # The error of the trace, and the roundings of this line.
    slack = (
        4 * n * float(jnp.finfo(x.dtype).eps) * (norm + n**0.5 * jnp.abs(shifts)) ** 2
    )
    centered = jnp.sqrt(jnp.maximum(squares, 0) + slack)
    return norm, jnp.min(shifts + centered)


def _perron(table):
    """Return an upper bound of the largest eigenvalue of a positive matrix `[k, k]`.

    By Collatz–Wielandt it is at most `max (A x)_i / x_i` for every positive x.
    """
    k = table.shape[0]
    eps = float(jnp.finfo(table.dtype).eps)
    power = table / jnp.max(table)
    for _ in range(12):
        power = _mm(power, power)
        power = power / _positive(jnp.max(power))
    x = jnp.maximum(jnp.sum(power, axis=1), float(jnp.finfo(table.dtype).tiny) ** 0.5)
    return jnp.max(_mm(table, x) / x) * (1 + (k + 8) * eps)


def _terms(length, block):
    """Return the k of the `γ_k` that bounds a sum made in blocks."""
    return min(block, length) + -(-length // block) + 1


def _sum_of_products(x, y, block, axis=0):
    """Return `xᵀ y` for `[m, n]` and `[m, k]`, or `x yᵀ` (`axis=1`), summed in blocks.

    The blocks are added in a loop: XLA:CPU takes several times as long for products
    side by side.
    """

    def part(begin, size):
        here = (jax.lax.dynamic_slice_in_dim(z, begin, size, axis) for z in (x, y))
        left, right = here
        return _mm(left, right.T) if axis else _mm(left.T, right)

    count, rest = divmod(x.shape[axis], block)
    total = part(x.shape[axis] - rest, rest)
    if count == 0:
        return total
    return jax.lax.fori_loop(
        0, count, lambda i, total: total + part(i * block, block), total
    )


def _apply(matrix, v, block):
    """Return `M v`, summed in blocks; products with zeros make no rounding errors."""
    own = jnp.arange(v.size) // block
    blocks = own[:, None] == jnp.arange(-(-v.size // block))[None, :]
    return jnp.sum(_mm(matrix, jnp.where(blocks, v[:, None], 0)), axis=1)


def _frobenius(x):
    """Return an upper bound of the Frobenius norm of `[m, n]`, tight up to rounding.

    Without the barrier XLA may merge both sums, and rounding then grows like `m n`.
    """
    rows = jax.lax.optimization_barrier(jnp.sum(x**2, axis=1))
    return jnp.sqrt(jnp.sum(rows)) * (1 + sum(x.shape) * float(jnp.finfo(x.dtype).eps))


def _unit_columns(x):
    return x / _positive(jnp.sqrt(jnp.sum(x**2, axis=0)))[None, :]


def _positive(x):
    return jnp.maximum(x, float(jnp.finfo(x.dtype).tiny))


def _orthonormal(x):
    return jnp.linalg.qr(x)[0]


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
