"""Preconditioners that are sums of Kronecker products, with a proven condition number.

`preconditioner` fits a symmetric sum to a symmetric positive definite matrix, or to its
inverse, such that the condition number of the preconditioned matrix is least. The
result is a pytree: it can be passed to jitted functions, and `solve` works under `jit`
and `vmap`.

>>> import numpy as np
>>> A = np.kron(np.diag([1.0, 2.0]), np.eye(2)) + np.kron(np.eye(2), [[2, 1], [1, 2]])
>>> M = preconditioner(A, Configuration((2, 2), rank=2), progress=False)
>>> bool(M.condition_bound < 1 + 1e-6)
True
>>> bool(np.allclose(M.solve(A @ np.ones(4)), 1, atol=1e-6))
True
"""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kronjax import display, validation
from kronjax.cpu_threads import one_blas_thread
from kronjax.io import matrices
from kronjax.io.progress import bar
from kronjax.kronecker import Configuration, KroneckerTerms, matmul
from kronjax.linalg.dense import multiply_out
from kronjax.operators import definite, fit
from kronjax.proof.certificate import Certificate, certificate_of

SWEEPS = 30
"""Rounds of the fit of one Kronecker product, enough for it to settle."""

SYMMETRY = 1e-12
"""Relative asymmetry of a matrix that counts as rounding."""

ARRAYS = 12
"""Number of arrays of the size of the matrix that a fit holds at once."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """A preconditioner, with a proof of what it does; a pytree.

    Attributes:
        terms: The sum `K ≈ A`, or `P ≈ A⁻¹` if `inverse`; factors `[r, n1, n1]` and
            `[r, n2, n2]`, float64, symmetric or both skew-symmetric.
        left: Matrix `U`, `[n1, n1]`, or None if `inverse`.
        right: Matrix `V`, `[n2, n2]`, or None: `K⁻¹ = (U ⊗ V) D (U ⊗ V)ᴴ`.
        weights: Diagonal of `D`, `[n1, n2]`, or None.
        inverse: Whether the sum approximates the inverse.
        error: `‖I − A^{-1/2} K A^{-1/2}‖_2`, or `‖I − A^{1/2} P A^{1/2}‖_2`.
        spectrum: Proven bounds of the eigenvalues of `K⁻¹ A`, or of `P A`; of the
            nonzero ones if a null space is deflated.
        ranks: Numbers of symmetric and of skew-symmetric products.
        seconds: Seconds of the fit, compilation included, and of the proof.
        notes: What was done on behalf of the user.
    """

    terms: KroneckerTerms
    left: jax.Array | np.ndarray | None
    right: jax.Array | np.ndarray | None
    weights: jax.Array | np.ndarray | None
    inverse: bool = dataclasses.field(metadata={"static": True})
    error: float = dataclasses.field(metadata={"static": True})
    spectrum: tuple[float, float] = dataclasses.field(metadata={"static": True})
    ranks: tuple[int, int] = dataclasses.field(metadata={"static": True})
    seconds: float = dataclasses.field(metadata={"static": True})
    notes: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self.terms.shape

    @property
    def condition_bound(self) -> float:
        """Proven bound of the condition number of the preconditioned matrix."""
        low, high = self.spectrum
        return high / low if low > 0 else math.inf

    def iterations(self, tolerance: float = 1e-8) -> float:
        """Return a bound of the iterations of conjugate gradients.

        Args:
            tolerance: Factor by which the A-norm of the error falls.
        """
        root = math.sqrt(self.condition_bound)
        if not math.isfinite(root):
            return math.inf
        if root == 1:
            return 1.0
        rate = (root - 1) / (root + 1)
        return max(math.ceil(math.log(tolerance / 2) / math.log(rate)), 1)

    def solve(self, x: Any) -> jax.Array:
        """Return `K⁻¹ x`, or `P x` if `inverse`; for `jit` and `vmap`.

        Args:
            x: `[..., n]`, right-hand sides; computed in the dtype of `x`, at least
                float32.

        Raises:
            ValueError: If the last axis is not that of the matrix, or `x` is complex.
        """
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[-1] != self.shape[0]:
            raise ValueError(
                f"x must have shape [..., {self.shape[0]}]; got {x.shape}. Transpose "
                "right-hand sides that are columns."
            )
        if jnp.iscomplexobj(x):
            raise ValueError("x is complex: solve for its real and imaginary parts.")
        dtype = np.dtype(x.dtype if x.dtype == jnp.float64 else jnp.float32)
        if self.inverse:
            # The sum is symmetric.
            return matmul(x.astype(dtype), _cast(self.terms, dtype))
        assert self.weights is not None
        if jnp.iscomplexobj(self.left) or jnp.iscomplexobj(self.right):
            dtype = np.result_type(dtype, np.complex64)
        left, right, weights = _cast((self.left, self.right, self.weights), dtype)
        y = x.astype(dtype).reshape(*x.shape[:-1], *weights.shape)
        mm = jnp.matmul
        inner = mm(mm(left.conj().T, y), right.conj())
        y = mm(mm(left, inner * jnp.broadcast_to(weights, inner.shape)), right.T)
        return jnp.real(y).reshape(x.shape)

    def certify(self, A: Any) -> Certificate:  # noqa: N803
        """Prove how much smaller the error of any other sum could be.

        The local gap says what a change of all left or of all right factors can gain,
        symmetric or not; the global bound holds for every sum of the same rank. The
        weight has a ridge of 1e-6 of its mean eigenvalue (`solver.weighted.RIDGE`),
        which shifts the error of the certificate at large condition numbers.

        Args:
            A: The matrix that was preconditioned, nonsingular.

        Returns:
            `Certificate` of `‖I − A^{-1/2} K A^{-1/2}‖_2`, or of its like for `P`.

        Raises:
            ValueError: If `A` is not symmetric positive definite, or of another shape.
        """
        matrix = _dense(A, [])
        if matrix.shape != self.shape:
            raise ValueError(
                f"the preconditioner is for shape {self.shape}; got {matrix.shape}."
            )
        _cholesky(matrix)
        near = np.linalg.inv(matrix)
        target, weight = (near, matrix) if self.inverse else (matrix, near)
        return certificate_of(target, (self.terms,), weight, weight)

    def as_linear_operator(self):
        """Return a `scipy.sparse.linalg.LinearOperator`, for `M=` of SciPy's solvers.

        It computes in float64 with NumPy.
        """
        import scipy.sparse.linalg

        apply = _on_host(self)
        operator: Any = scipy.sparse.linalg.LinearOperator
        return operator(
            self.shape,
            matvec=lambda x: apply(np.reshape(x, (1, -1)))[0],
            matmat=lambda x: apply(np.ascontiguousarray(np.asarray(x).T)).T,
            rmatvec=lambda x: apply(np.reshape(x, (1, -1)))[0],
            dtype=np.float64,
        )

    def __repr__(self) -> str:
        """Return the sum, the proven spectrum and what it means."""
        return "\n".join(display.lines(*self._summary()))

    def _repr_html_(self) -> str:
        title, rows = self._summary()
        return display.table(title, rows)

    def _summary(self):
        n1, n2 = self.terms.a.shape[-1], self.terms.b.shape[-1]
        symmetric, skew = self.ranks
        what = "P A" if self.inverse else "K^-1 A"
        low, high = self.spectrum
        parts = [(self.terms.rank, (n1, n1), (n2, n2))]
        kinds = f"{symmetric} symmetric" + f", {skew} skew-symmetric" * (skew > 0)
        rows = [
            ("sum", f"{display.formula(parts)} ({kinds})"),
            ("error", f"{self.error:.5g}"),
            ("spectrum", f"of {what}: proven in [{low:.6g}, {high:.6g}]"),
            ("condition", f"at most {self.condition_bound:.5g}"),
            ("iterations", f"at most {self.iterations():g} of CG to 1e-8"),
            ("time", f"{self.seconds:.2f} s"),
        ]
        if self.notes:
            rows.append(("notes", "; ".join(self.notes)))
        of, n = "the inverse of " * self.inverse, self.shape[0]
        return f"Preconditioner: a sum near {of}a {n}x{n} matrix", rows


def preconditioner(
    A: Any,  # noqa: N803
    configuration: Configuration,
    *,
    inverse: bool = False,
    null_space: Any = None,
    num_starts: int = 4,
    seed: int = 0,
    progress: bool | None = None,
) -> Preconditioner:
    """Return the sum of Kronecker products that preconditions a matrix best.

    Minimises the condition number of `K⁻¹ A` over symmetric sums `K` of `rank`
    products, or of `P A` over sums `P`, and proves a bound of it.

    Args:
        A: `[n, n]`, symmetric positive definite: NumPy, jax, SciPy sparse, or
            `KroneckerTerms`. Computed in float64.
        configuration: The left factors, `(n1, n1)`, and the rank.
        inverse: Whether the sum approximates the inverse. It is then applied by
            products alone and may have any rank. Otherwise the rank is 1 or 2, and the
            sum is inverted exactly by its factors.
        null_space: Vectors `[n]` or `[n, k]` that span the null space of a singular
            `A`, such as the constant vector of a Neumann problem. The result then
            preconditions `A` on the complement.
        num_starts: Number of starts.
        seed: Seed of the perturbed starts.
        progress: Whether to show the progress on standard error; by default when that
            is a terminal and the fit takes longer than two seconds.

    Returns:
        `Preconditioner`.

    Raises:
        ValueError: If `A` is not finite, not symmetric, or not positive definite (the
            eigenvalue is named), the configuration does not fit, the rank is above 2
            without `inverse`, or no definite sum is found.
        MemoryError: If the arrays do not fit into memory; says how much they take.
    """
    if num_starts < 1:
        raise ValueError(f"num_starts must be at least 1; got {num_starts}.")
    notes: list[str] = []
    sizes = _check(A, configuration, inverse)
    matrix = _dense(A, notes)
    null = None
    if null_space is not None:
        matrix, null = _deflated(matrix, null_space)
        notes.append(f"{null.shape[1]} null vectors deflated")
    begun = time.perf_counter()
    with (
        jax.enable_x64(True),
        one_blas_thread(),
        bar(1, "fitting", unit=None, wanted=progress) as tick,
    ):
        lower = _cholesky(matrix)
        fitted = _fitted(
            matrix,
            lower,
            sizes,
            configuration.rank,
            inverse,
            num_starts=num_starts,
            seed=seed,
            tell=lambda text: tick(0, text),
        )
        if fitted.error >= 1:
            raise ValueError(
                f"no definite sum of {configuration.rank} products was found: pass "
                "another seed, more num_starts, or rank=1."
            )
        terms = fitted.terms
        spectrum = _proven(matrix, lower, terms, inverse)
        tick(1)
    left = right = weights = None
    if not inverse:
        left, right, weights = _diagonalised(terms)
    return Preconditioner(
        terms=terms,
        left=left,
        right=right,
        weights=weights,
        inverse=inverse,
        error=fitted.error,
        spectrum=spectrum,
        ranks=fitted.ranks,
        seconds=time.perf_counter() - begun,
        notes=tuple(notes),
    )


def frobenius(
    matrix: np.ndarray,
    configuration: Configuration,
    *,
    inverse: bool = False,
    num_starts: int = 4,
) -> KroneckerTerms:
    """Return the symmetric sum of least weighted Frobenius error, to compare with.

    It minimises `‖I − A^{-1/2} K A^{-1/2}‖_F`, or `‖I − A^{1/2} P A^{1/2}‖_F`. Of the
    starts the one with the least condition number is returned, at its best scale.

    Args:
        matrix: `A`, `[n, n]`, symmetric positive definite, float64.
        configuration: As for `preconditioner`, and so are the others.
        inverse: Whether the sum approximates the inverse.
        num_starts: Number of starts.
    """
    sizes = _check(matrix, configuration, True)
    with jax.enable_x64(True), one_blas_thread():
        fitted = _fitted(
            matrix,
            _cholesky(matrix),
            sizes,
            configuration.rank,
            inverse,
            num_starts=num_starts,
            squarings=(-1,),
        )
    return fitted.terms


def _fitted(matrix, lower, sizes, rank, inverse, **options) -> fit.Fitted:
    """Return the sum near `A = L Lᵀ`, or near its inverse; options as for `fit.fit`."""
    first, second = _nearest_product(matrix, sizes)
    (root1, back1), (root2, back2) = _roots(first), _roots(second)
    back = np.kron(back1, back2)
    middle = back @ matrix @ back
    if inverse:
        q, begin, outer = lower.T @ back, np.linalg.inv(middle), (back1, back2)
    else:
        q, begin = _triangular(lower, np.kron(root1, root2)), middle
        outer = root1, root2
    fitted = fit.fit(q, begin, sizes, rank, **options)
    factors = zip(outer, (fitted.terms.a, fitted.terms.b), strict=True)
    terms = KroneckerTerms(*(_parity(x @ factor @ x) for x, factor in factors))
    return dataclasses.replace(fitted, terms=terms)


def _check(given, configuration, inverse) -> tuple[int, int]:
    """Check shapes, the rank and the memory; return `(n1, n2)`."""
    shape = tuple(np.shape(given) if not hasattr(given, "shape") else given.shape)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"A must be a square matrix [n, n]; got shape {shape}.")
    if not isinstance(configuration, Configuration):
        raise ValueError(
            f"preconditioner takes a Configuration((n1, n1), rank=r); got "
            f"{configuration!r}."
        )
    (n1, columns), (n2, _) = configuration.a_shape, configuration.b_shape(shape)
    if n1 != columns:
        raise ValueError(
            f"left factors of a preconditioner are square; got {configuration.a_shape}."
        )
    rank = configuration.rank
    if not inverse and rank > 2:
        raise ValueError(
            f"a sum of {rank} products cannot be inverted by its factors: pass "
            "inverse=True, which approximates the inverse by a sum of any rank, or "
            "rank=2."
        )
    most = min(n1 * (n1 + 1), n2 * (n2 + 1)) // 2
    if rank > most:
        raise ValueError(f"the rank is at most {most} with such factors; got {rank}.")
    needed = ARRAYS * 8 * shape[0] ** 2
    if needed > matrices.physical_memory():
        raise MemoryError(
            f"a matrix of {shape[0]:,} rows takes {needed / 2**30:,.0f} GiB here, and "
            f"there are {matrices.physical_memory() / 2**30:,.0f} GiB."
        )
    return n1, n2


def _dense(given, notes) -> np.ndarray:
    """Return the matrix, symmetric and float64."""
    if isinstance(given, KroneckerTerms):
        given = multiply_out(*(np.asarray(x, np.float64) for x in (given.a, given.b)))
    elif hasattr(given, "toarray"):
        given = given.toarray()
    matrix = validation.matrix(given, "float64", notes)
    largest = np.max(np.abs(matrix))
    away = np.abs(matrix - matrix.T)
    i, j = np.unravel_index(np.argmax(away), away.shape)
    if away[i, j] > SYMMETRY * largest:
        raise ValueError(
            f"A is not symmetric: A[{i}, {j}] = {matrix[i, j]:.6g} and A[{j}, {i}] = "
            f"{matrix[j, i]:.6g}. Pass (A + A.T) / 2 if that is rounding."
        )
    return (matrix + matrix.T) / 2


def _deflated(matrix, null_space):
    """Return the matrix plus a multiple of the projection onto its null space."""
    vectors = np.asarray(null_space, np.float64)
    vectors = vectors[:, None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or len(vectors) != len(matrix):
        raise ValueError(
            f"null_space must be [{len(matrix)}] or [{len(matrix)}, k]; got shape "
            f"{np.shape(null_space)}."
        )
    q, r = np.linalg.qr(vectors)
    if np.min(np.abs(np.diagonal(r))) <= 1e-12 * np.max(np.abs(r)):
        raise ValueError("the vectors of null_space are not linearly independent.")
    size = np.linalg.norm(matrix @ q, 2)
    mean = np.trace(matrix) / len(matrix)
    if size > 1e-8 * mean:
        raise ValueError(
            f"null_space is not the null space of A: A maps a unit vector of it to "
            f"length {size:.3g}."
        )
    return matrix + mean * (q @ q.T), q


def _cholesky(matrix):
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        at = int(np.argmax(np.abs(vectors[:, 0])))
        tiny = abs(values[0]) <= 1e-10 * values[-1]
        remedy = (
            "Pass null_space= to deflate its null space, such as constant vectors"
            if tiny
            else "A preconditioner for conjugate gradients needs a definite matrix"
        )
        raise ValueError(
            f"A is not positive definite: its least eigenvalue is {values[0]:.4g} (the "
            f"largest is {values[-1]:.4g}), with an eigenvector that is largest at "
            f"entry {at}. {remedy}."
        ) from None


def _triangular(lower, right):
    import scipy.linalg

    return scipy.linalg.solve_triangular(lower, right, lower=True)


def _nearest_product(matrix, sizes):
    """Return factors of a definite Kronecker product near a matrix (flip-flop).

    Reference: Dutilleul (1999).
    """
    n1, n2 = sizes
    tensor = matrix.reshape(n1, n2, n1, n2)
    second = np.eye(n2)
    for _ in range(SWEEPS):
        first = np.einsum("ipjq,qp->ij", tensor, np.linalg.inv(second)) / n2
        second = np.einsum("ipjq,ji->pq", tensor, np.linalg.inv(first)) / n1
    return (first + first.T) / 2, (second + second.T) / 2


def _roots(symmetric):
    """Return the square root of a definite matrix, and its inverse."""
    values, vectors = np.linalg.eigh(symmetric)
    root = np.sqrt(values)
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _parity(factors):
    """Return factors with the rounding of their symmetry removed, `[r, n, n]`."""
    turned = np.swapaxes(factors, -2, -1)
    sign = np.sign(np.sum(factors * turned, axis=(-2, -1)))[:, None, None]
    return (factors + sign * turned) / 2


def _proven(matrix, lower, terms, inverse) -> tuple[float, float]:
    """Return proven bounds of the spectrum of `K⁻¹ A`, or of `P A`."""
    whole = multiply_out(terms.a, terms.b)
    if inverse:
        image = lower.T @ whole @ lower
        pencil = definite.inverse(matrix, terms.a, terms.b)
    else:
        image = _triangular(lower, _triangular(lower, whole).T)
        pencil = definite.forward(matrix, terms.a, terms.b)
    values = np.linalg.eigvalsh((image + image.T) / 2)
    low, high = pencil.bounds(float(values[0]), float(values[-1]))
    if inverse:
        return low, high
    return 1 / high, 1 / low if low > 0 else math.inf


def _diagonalised(terms):
    """Return `U`, `V` and `D` with `(Σ A_k ⊗ B_k)⁻¹ = (U ⊗ V) D (U ⊗ V)ᴴ`.

    For two symmetric products both pencils `(A_1, A_2)` and `(B_1, B_2)` contain a
    definite matrix, since `Σ_k (yᵀ B_k y) A_k` is definite for any y if the sum is.
    """
    import scipy.linalg

    a, b = np.asarray(terms.a), np.asarray(terms.b)

    def bases(own, other):
        # The best conditioned of a few combinations that are definite.
        vectors = np.linalg.eigh(sum(x @ x.T for x in other))[1]
        candidates = []
        for y in (np.ones(len(vectors)), *vectors.T):
            shares = [float(y @ x @ y) for x in other]
            candidate = np.sum([s * x for s, x in zip(shares, own, strict=True)], 0)
            values = np.linalg.eigvalsh(candidate)
            quality = values[0] / values[-1] if values[-1] > 0 else -1.0
            candidates.append((quality, candidate))
        best = max(candidates, key=lambda x: x[0])[1]
        return np.linalg.inv(np.linalg.cholesky(best)).T

    def diagonalise(own, other):
        left = bases(own, other)
        images = [left.T @ factor @ left for factor in own]
        # The combination that is the identity needs no diagonalisation; skew factors
        # are normal, with imaginary eigenvalues.
        is_skew = [np.allclose(x, -x.T, atol=1e-9 * np.abs(x).max()) for x in images]
        chosen = images[-1]
        if is_skew[-1]:
            turn = np.linalg.eigh(1j * chosen)[1]
        else:
            away = [x - np.trace(x) / len(x) * np.eye(len(x)) for x in images]
            turn = scipy.linalg.eigh(max(away, key=np.linalg.norm))[1]
        basis = left @ turn
        values = [np.sum(basis.conj() * (x @ basis), axis=0) for x in own]
        return basis, np.array(values)

    left, first = diagonalise(a, b)
    right, second = diagonalise(b, a)
    return left, right, 1 / np.real(first.T @ second)


def _cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _on_host(self):
    """Return `solve` for `[k, n]` in NumPy."""
    a, b = (np.asarray(x) for x in (self.terms.a, self.terms.b))
    n1, n2 = a.shape[-1], b.shape[-1]

    def products(x):
        y = x.reshape(-1, n1, n2)
        parts = [p @ y @ q.T for p, q in zip(a, b, strict=True)]
        return np.sum(parts, axis=0).reshape(x.shape)

    if self.inverse:
        return products
    left, right, weights = map(np.asarray, (self.left, self.right, self.weights))

    def divided(x):
        y = left.conj().T @ x.reshape(-1, n1, n2) @ right.conj() * weights
        return np.real(left @ y @ right.T).reshape(x.shape)

    return divided
