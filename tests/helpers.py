"""Independent references in float64 NumPy: slow and simple."""

import contextlib
import socket

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax.kronecker import KroneckerTerms

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A journey of a thousand miles begins with a single step.",
    "She sells sea shells by the sea shore, and the shells she sells are sea shells.",
]

# Whole models with c_fc and c_proj of all blocks of GPT-2 small as one Kronecker
# product (m1, n1) ⊗ (3072 / m1, 768 / n1): Krony-PT (Ayoub et al., 2024).
KRONY_PT = {
    (64, 32): 67_893_504,
    (64, 48): 67_908_864,
    (96, 32): 67_908_864,
    (64, 64): 67_928_832,
    (128, 32): 67_928_832,
    (96, 48): 67_939_584,
    (96, 64): 67_973_376,
    (128, 48): 67_973_376,
    (128, 64): 68_020_224,
    (96, 96): 68_044_032,
    (192, 48): 68_044_032,
    (128, 96): 68_116_224,
    (192, 64): 68_116_224,
    (128, 128): 68_213_376,
    (256, 64): 68_213_376,
    (1024, 256): 74_108_376,
    (768, 384): 74_894_784,
    (1024, 384): 77_254_032,
    (768, 768): 81_972_576,
    (1536, 384): 81_972_576,
    (1024, 768): 86_691_144,
    (1536, 768): 96_128_304,
    (3072, 768): 124_439_832,
}


def rearrange_reference(matrix, a_shape):
    """Return the rearrangement `[m1 n1, m2 n2]`, one block of `matrix` at a time."""
    matrix = np.asarray(matrix, dtype=np.float64)
    m1, n1 = a_shape
    m2, n2 = matrix.shape[0] // m1, matrix.shape[1] // n1
    assert (m1 * m2, n1 * n2) == matrix.shape
    rows = []
    for i in range(m1):
        for j in range(n1):
            block = matrix[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2]
            rows.append([block[row, col] for row in range(m2) for col in range(n2)])
    return np.array(rows)


def kronecker_sum_reference(a, b):
    """Return `sum_k A_k ⊗ B_k` of `a: [r, m1, n1]` and `b: [r, m2, n2]`."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    assert len(a) == len(b)
    return sum(np.kron(left, right) for left, right in zip(a, b, strict=True))


def van_loan(matrix, a_shape, rank):
    """Return the nearest sum in the Frobenius norm."""
    (m, n), (m1, n1) = matrix.shape, a_shape
    m2, n2 = m // m1, n // n1
    blocks = matrix.reshape(m1, m2, n1, n2).transpose(0, 2, 1, 3)
    u, s, vt = np.linalg.svd(blocks.reshape(m1 * n1, -1), full_matrices=False)
    a = (u[:, :rank] * np.sqrt(s[:rank])).T.reshape(rank, m1, n1)
    b = (np.sqrt(s[:rank])[:, None] * vt[:rank]).reshape(rank, m2, n2)
    return KroneckerTerms(a, b)


def total(terms):
    """Return the matrix of several sums, one for each configuration."""
    return sum(
        np.kron(a, b) for one in terms for a, b in zip(one.a, one.b, strict=True)
    )


def schatten_reference(matrix, p):
    """Return the Schatten p-norm `(Σ σ_i^p)^(1/p)`; the spectral norm at p = inf."""
    matrix = np.asarray(matrix, dtype=np.float64)
    scale = np.max(np.abs(matrix), initial=0.0)
    if scale == 0.0:
        return 0.0
    sigma = np.linalg.svd(matrix / scale, compute_uv=False)
    if np.isinf(p):
        return float(scale * sigma[0])
    # The largest ratio is one, so no power overflows, and the powers that underflow
    # would have been lost beside that one.
    ratios = sigma / sigma[0]
    return float(scale * sigma[0] * np.sum(ratios**p) ** (1.0 / p))


def tolerance(dtype, factor=100.0):
    """Return a relative tolerance of `factor` roundings in `dtype`."""
    return factor * float(jnp.finfo(dtype).eps)


def losses_reference(model, tokens):
    """Return losses of all tokens `[n]` but the first, and which were the likeliest."""
    # One shape for all lengths: a causal model does not see later tokens.
    read = np.zeros((1, model.config.context), np.int32)
    read[0, : len(tokens) - 1] = tokens[:-1]
    logits = np.asarray(_logits(model, read))[0, : len(tokens) - 1].astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logarithms = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    targets = np.asarray(tokens)[1:]
    losses = -logarithms[np.arange(len(targets)), targets]
    return losses, logits.argmax(axis=-1) == targets


@nnx.jit
def _logits(model, tokens):
    return model(tokens)


@contextlib.contextmanager
def as_users_run_it():
    """Use 32 bits, and the promotion of dtypes and ranks that flax needs."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def free_port():
    """Return a free TCP port of this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
