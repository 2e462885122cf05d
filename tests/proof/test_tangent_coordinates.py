import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax.proof.tangent_coordinates import Sheet

SHAPES = [((2, 3), (3, 2), 1), ((3, 2), (2, 4), 2), ((1, 4), (5, 2), 1)]


def draw(case, seed):
    """Return a sheet of the given shape and a random generator."""
    (m1, n1), (m2, n2), r = case
    draws = np.random.default_rng(seed)
    a = draws.standard_normal((r, m1 * n1))
    b = draws.standard_normal((r, m2 * n2))
    return Sheet.of(a, np.eye(r), b, ((m1, n1), (m2, n2))), draws


cases = given(st.sampled_from(SHAPES), st.integers(0, 10_000))


@cases
def test_push_is_an_isometry_and_project_its_adjoint(case, seed):
    sheet, draws = draw(case, seed)
    xi = draws.standard_normal(sheet.dimension)
    ambient = draws.standard_normal(sheet.matrix().shape)
    tangent = sheet.push(xi)
    assert np.linalg.norm(tangent) == pytest.approx(np.linalg.norm(xi))
    np.testing.assert_allclose(sheet.project(tangent), xi, atol=1e-12)
    assert np.sum(ambient * tangent) == pytest.approx(sheet.project(ambient) @ xi)


@cases
def test_pulled_vectors_are_projections(case, seed):
    sheet, draws = draw(case, seed)
    m, n = sheet.matrix().shape
    u, v = draws.standard_normal((2, m)), draws.standard_normal((3, n))
    pulled = sheet.pull(u, v)
    for i, j in itertools.product(range(2), range(3)):
        projected = sheet.project(np.outer(u[i], v[j]))
        np.testing.assert_allclose(pulled[i, j], projected, atol=1e-12)


@cases
def test_forms_are_traces(case, seed):
    sheet, draws = draw(case, seed)
    m, n = sheet.matrix().shape
    q, p = (x + x.T for x in (draws.standard_normal((k, k)) for k in (m, n)))
    one, other = draws.standard_normal((2, n, m))
    form = sheet.form([(q, p)], [(one, other)])
    xi = draws.standard_normal(sheet.dimension)
    x = sheet.push(xi)
    wanted = np.trace(x.T @ q @ x @ p) + 2 * np.trace(x @ one @ x @ other)
    assert xi @ form @ xi == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(form, form.T, atol=1e-9)


@cases
def test_the_bend_is_the_second_derivative_of_the_retraction(case, seed):
    sheet, draws = draw(case, seed)
    normal = draws.standard_normal(sheet.matrix().shape)
    xi = draws.standard_normal(sheet.dimension)
    step = 1e-3 * np.linalg.svd(sheet.core, compute_uv=False)[-1]
    ends = [sheet.moved(x * step * xi).matrix() for x in (-1, 0, 1)]
    bend = -np.sum(normal * (ends[2] - 2 * ends[1] + ends[0])) / step**2
    matrix = sheet.bend(normal)
    assert xi @ matrix @ xi == pytest.approx(bend, rel=1e-2, abs=1e-2)
    np.testing.assert_allclose(sheet.bent(normal, xi), matrix @ xi, atol=1e-9)
