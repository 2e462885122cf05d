"""Matrices of differential operators on small grids."""

import numpy as np


def diffusion(n1, n2, coefficient=lambda x, y: 1 + x + 2 * y * y):
    """Return −∇·(a∇u) on `n1 × n2` interior points, five-point, Dirichlet."""
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
