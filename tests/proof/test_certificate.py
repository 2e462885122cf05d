import dataclasses

import numpy as np
import pytest

import kronjax
from kronjax import Configuration
from kronjax.proof.certificate import certificate_of, certify

SMALL = Configuration((2, 3), 1)


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape)


def solved(matrix, **options):
    options = {"num_starts": 1, "progress": False, "norm": "frobenius", **options}
    return kronjax.approximate(matrix, SMALL, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_batch_has_the_certificates_of_its_matrices(dtype):
    matrices = draw(2, 6, 6).astype(dtype)
    right = np.diag(np.arange(1.0, 7.0))
    found = solved(matrices, right_weight=right)
    batch = certify(found, matrices, right_weight=right)
    assert batch.error.shape == batch.second_order.shape == (2,)
    np.testing.assert_allclose(batch.error, found.weighted.spectral, rtol=1e-4)
    for i, matrix in enumerate(matrices):
        terms = tuple(type(x)(x.a[i], x.b[i]) for x in found.terms)
        single = certificate_of(matrix, terms, None, right)
        for field in ("error", "local_bound", "global_bound"):
            assert getattr(single, field) == getattr(batch, field)[i]


def test_any_object_with_terms_and_finishes_can_be_certified():
    @dataclasses.dataclass
    class Sum:
        terms: tuple
        finishes: tuple | None = None

    matrix = draw(6, 6)
    found = solved(matrix)
    proof = certify(Sum(found.terms), matrix)
    assert proof.error == pytest.approx(found.error.spectral, rel=1e-12)
    assert 0 < proof.global_bound <= proof.local_bound <= proof.error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": draw(6, 8)}, r"of matrices of shape \(6, 6\); got shape \(6, 8\)"),
        ({"matrix": draw(2, 6, 6)}, r"got shape \(2, 6, 6\)"),
        ({"matrix": np.full((6, 6), np.nan)}, "36 NaN or infinite entries"),
        ({"matrix": draw(6, 6) * 1j}, "real numbers"),
        ({"left_weight": np.eye(5)}, r"left_weight must be \[6, 6\]"),
        ({"right_weight": -np.eye(6)}, "not positive semidefinite"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    matrix = draw(6, 6)
    with pytest.raises(ValueError, match=message):
        certify(solved(matrix), **{"matrix": matrix, **change})


def test_a_finish_is_valid_for_its_own_matrix_and_weights_only():
    matrix, right = draw(6, 6), np.diag(np.arange(1.0, 7.0))
    found = solved(matrix, right_weight=right, norm="spectral", finish=True)
    proof = certify(found, matrix, right_weight=right)
    assert proof.second_order == "strict local minimum"
    assert proof.local_gap < 1e-8
    for other in ({"matrix": matrix}, {"matrix": 1.01 * matrix, "right_weight": right}):
        with pytest.raises(ValueError, match="second-order finish"):
            certify(found, **other)
    # Without the finish any matrix of the shape can be compared with.
    bare = dataclasses.replace(found, finishes=None)
    assert certify(bare, matrix).second_order == ""
