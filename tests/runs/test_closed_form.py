"""Low rank in closed form: numbers, bounds, and what is decomposed once."""

import numpy as np
import pytest

from kronjax.io.cache import Cache
from kronjax.runs.closed_form import LowRank
from kronjax.runs.joint import Target


def draw(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def product(terms):
    return np.einsum("rmi,rin->mn", terms.a.astype(np.float64), terms.b)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (5, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_rank_is_the_truncated_decomposition(shape, dtype):
    matrix = draw(shape, dtype)
    low_rank = LowRank.of(Target("", matrix))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    for rank in range(1, len(s) + 1):
        terms, relative = low_rank.fit(rank)
        root = np.sqrt(s[:rank])
        np.testing.assert_array_equal(terms.a[:, :, 0], (u[:, :rank] * root).T)
        np.testing.assert_array_equal(terms.b[:, 0], root[:, None] * vt[:rank])
        assert terms.a.dtype == dtype
        error = np.linalg.norm(matrix - product(terms)) / np.linalg.norm(matrix)
        assert relative == pytest.approx(error, rel=1e-4, abs=1e-6)
    assert low_rank.total == pytest.approx(np.sum(np.float64(matrix) ** 2) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_just_below_the_spectral_error(seed):
    matrix = draw((20, 30), seed=seed)
    low_rank = LowRank.of(Target("", matrix))
    s = np.linalg.svd(np.float64(matrix), compute_uv=False)
    for rank in range(20):
        assert s[rank] * (1 - 1e-4) < low_rank.bound(rank) <= s[rank]
    assert low_rank.bound(20) == 0


@pytest.mark.parametrize("size", [1e38, 1e-30])
def test_the_scale_does_not_matter(size):
    matrix = np.full((6, 4), size, np.float32) * (1 + 0.1 * draw((6, 4)))
    terms, relative = LowRank.of(Target("", matrix)).fit(1)
    unit = np.float64(matrix) / size
    s = np.linalg.svd(unit, compute_uv=False)
    np.testing.assert_allclose(
        np.linalg.norm(unit - product(terms) / size, 2), s[1], rtol=1e-4
    )
    assert 0 < relative < 0.2


@pytest.mark.parametrize("sides", [(False, False), (True, False), (True, True)])
def test_what_is_kept_is_read_back_unchanged(tmp_path, sides):
    square = [draw((k, k), seed=k) for k in (6, 4)]
    weights = [x @ x.T if side else None for x, side in zip(square, sides, strict=True)]
    target = Target("", draw((6, 4)), *weights)
    first = LowRank.kept(target, Cache(tmp_path))
    again = LowRank.kept(target, Cache(tmp_path))
    for name in ("a", "b", "values", "tails"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("entry", [0, np.nan, np.inf])
def test_of_zeros_nothing_is_left(entry):
    low_rank = LowRank.of(Target("", np.full((3, 2), entry, np.float32)))
    assert low_rank.fit(1)[1] == low_rank.bound(1) == low_rank.total == 0
