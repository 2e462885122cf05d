"""Matrices of operators on grids: diffusion, finite elements, kernels.

Points are numbered row by row; the factors of an `n1 × n2` grid are `[n1, n1]` and
`[n2, n2]`.
"""

import numpy as np


def smooth(x, y):
    """Return a coefficient without jumps, between 0.14 and 7.4."""
    return np.exp(2 * np.sin(4 * x * y + 2 * x) * np.cos(3 * y))


def disk(contrast):
    """Return a coefficient that is larger in a disk beside the centre."""
    return lambda x, y: np.where((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.09, contrast, 1.0)


def waves(contrast):
    """Return a smooth coefficient of a given contrast."""
    half = np.log(contrast) / 2
    return lambda x, y: np.exp(
        half * np.sin(2 * np.pi * (x + y / 2)) * np.cos(3 * np.pi * y * (1 - x / 2))
    )


def stripes(contrast):
    """Return a coefficient that is larger in diagonal stripes."""
    return lambda x, y: np.where((4 * (x + y)) % 2 < 1, contrast, 1.0)


def diffusion(n1, n2, coefficient=lambda x, y: 1 + x + 2 * y * y):
    """Return −∇·(a∇u) on `n1 × n2` interior points, five-point, Dirichlet.

    The coefficient is taken at the midpoints of faces, and 1/h² is left out.
    """
    matrix = np.zeros((n1 * n2, n1 * n2))
    for i in range(n1):
        for j in range(n2):
            x, y, own = (i + 1) / (n1 + 1), (j + 1) / (n2 + 1), i * n2 + j
            for di, dj in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                flux = coefficient(x + di / (2 * n1 + 2), y + dj / (2 * n2 + 2))
                matrix[own, own] += flux
                if 0 <= i + di < n1 and 0 <= j + dj < n2:
                    matrix[own, (i + di) * n2 + j + dj] -= flux
    return matrix


def anisotropic(n, ratio=0.05, angle=np.pi / 6):
    """Return the nine-point stencil of a constant tensor: a sum of three products."""
    c, s = np.cos(angle), np.sin(angle)
    first, second = c * c + ratio * s * s, s * s + ratio * c * c
    mixed = (1 - ratio) * c * s
    eye, up, down = np.eye(n), np.eye(n, k=1), np.eye(n, k=-1)
    return (
        2 * (first + second) * np.kron(eye, eye)
        - first * np.kron(up + down, eye)
        - second * np.kron(eye, up + down)
        - mixed / 2 * np.kron(up - down, up - down)
    )


def finite_elements(n, coefficient):
    """Return bilinear finite elements of −∇·(a∇u), Dirichlet, `n × n` inner nodes.

    The coefficient is constant on every element: its value at the centre.
    """
    stiffness, mass = np.array([[1, -1], [-1, 1]]), np.array([[2, 1], [1, 2]]) / 6
    own = np.kron(stiffness, mass) + np.kron(mass, stiffness)
    whole = np.zeros(((n + 2) ** 2, (n + 2) ** 2))
    for i in range(n + 1):
        for j in range(n + 1):
            nodes = [(i + p) * (n + 2) + j + q for p in (0, 1) for q in (0, 1)]
            value = coefficient((i + 0.5) / (n + 1), (j + 0.5) / (n + 1))
            whole[np.ix_(nodes, nodes)] += value * own
    inner = [i * (n + 2) + j for i in range(1, n + 1) for j in range(1, n + 1)]
    return whole[np.ix_(inner, inner)]


def kernel(n, name, missing=0.0, nugget=1e-2, seed=0):
    """Return a rotated, anisotropic kernel on a grid, plus a nugget.

    Rows and columns of missing points are those of the identity: the matrix keeps its
    grid, and its solutions are those of the points that are there.

    Args:
        n: Points of a side.
        name: "matern" (3/2) or "rbf".
        missing: Fraction of the points that are missing.
        nugget: Added to the diagonal.
        seed: Seed of the choice of missing points.
    """
    x, y = (z.ravel() for z in np.meshgrid(*2 * [np.arange(n) / n], indexing="ij"))
    u, v = (x + y) / 0.5, (x - y) / 0.15
    distance = np.sqrt((u[:, None] - u) ** 2 + (v[:, None] - v) ** 2)
    root = np.sqrt(3) * distance
    values = (1 + root) * np.exp(-root) if name == "matern" else np.exp(-(distance**2))
    matrix = values + nugget * np.eye(n * n)
    gone = np.random.default_rng(seed).random(n * n) < missing
    matrix[gone] = matrix[:, gone] = 0
    matrix[gone, gone] = 1
    return matrix


def cases(n):
    """Yield names and matrices `[n², n²]` of a grid of `n × n` points."""
    yield "diffusion, smooth", diffusion(n, n, smooth)
    for contrast in (1e1, 1e2, 1e4):
        for coefficient in (waves, disk, stripes):
            name = f"diffusion, {coefficient.__name__} {contrast:g}"
            yield name, diffusion(n, n, coefficient(contrast))
    for ratio in (0.1, 0.01):
        yield f"anisotropic, {ratio:g}", anisotropic(n, ratio)
    yield "finite elements, waves 100", finite_elements(n, waves(1e2))
    for name in ("matern", "rbf"):
        for missing in (0.0, 0.1, 0.3):
            yield f"{name}, {missing:.0%} missing", kernel(n, name, missing)
