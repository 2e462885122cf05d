"""Laws of norms: their words, their stages and their closed forms."""

import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax.kronecker import Configuration
from kronjax.linalg import schatten
from kronjax.norm import EXPONENTS, MAX_SQUARINGS, Norm

NORMS = [Norm(p) for p in (*EXPONENTS, math.inf)]
norms = st.sampled_from(NORMS)


@given(norms)
def test_the_word_of_a_norm_is_parsed_back(norm):
    assert Norm.parse(str(norm)) == norm == Norm.parse(norm) == Norm.parse(norm.p)
    assert hash(Norm.parse(str(norm))) == hash(norm)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("spectral", "spectral"),
        (math.inf, "spectral"),
        ("inf", "spectral"),
        ("frobenius", "frobenius"),
        (2, "frobenius"),
        ("schatten:2", "frobenius"),
        ("schatten:4.0", "schatten:4"),
        (np.float32(4098), "schatten:4098"),
    ],
)
def test_words_and_numbers_name_norms(given, word):
    assert str(Norm.parse(given)) == word


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "frobenuis",
            r'"schatten:P" with P = 2, 4, .*4098; .*Did you mean frobenius\?',
        ),
        ("Spectral", r"Did you mean spectral\?"),
        ("schatten-4", r"Did you mean schatten:P\?"),
        ("l1", r"got 'l1'\.$"),
        ("schatten:spectral", 'norm must be "spectral"'),
        ("schatten:5", r"p = 2, 4, 6, 10, .*got p = 5; the nearest is 4\.$"),
        (1e4, "got p = 10000; the nearest is 4098"),
        ("nan", r"got p = nan\.$"),
        ("-inf", r"got p = -inf\.$"),
    ],
)
def test_unknown_norms_are_refused_with_the_nearest(given, message):
    with pytest.raises(ValueError, match=message):
        Norm.parse(given)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_the_last_stage_has_the_exponent_of_the_norm(norm):
    p = int(schatten.exponent(norm.squarings))
    assert p == (4098 if norm.is_spectral else norm.p)


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("schedule", ["adaptive", "fixed", [4, 18, 258]])
def test_stages_rise_to_the_norm(norm, schedule):
    for solved in (True, False):
        stages = norm.stages(schedule, starts_at_frobenius=solved)
        assert list(stages) == sorted(set(stages))
        assert solved == (-1 not in stages)
        if norm.is_spectral:
            assert stages[-1] == (MAX_SQUARINGS if isinstance(schedule, str) else 7)
        elif not (norm.is_frobenius and solved):
            assert stages[-1] == norm.squarings
        else:
            assert stages == ()


@pytest.mark.parametrize("schedule", ["doubling", [], [6, 4], [4, 4], [2, 4], [4, 5]])
def test_schedules_that_do_not_rise_are_refused(schedule):
    with pytest.raises(ValueError, match="schedule must be|p = 5"):
        Norm(math.inf).stages(schedule)


def test_only_the_spectral_norm_is_adaptive():
    assert [norm.is_adaptive("adaptive") for norm in NORMS] == [
        norm.is_spectral for norm in NORMS
    ]
    assert not Norm(math.inf).is_adaptive("fixed")
    assert not Norm(math.inf).is_adaptive(np.array([4.0, 6.0]))


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize(
    ("shapes", "weighted", "of_frobenius", "of_others"),
    [
        ([(2, 3)], (False, False), True, False),
        ([(2, 3)], (True, False), False, False),
        ([(4, 3)], (True, False), True, False),
        ([(4, 1)], (True, True), True, True),
        ([(1, 6)], (True, True), True, True),
        ([(4, 6)], (True, True), True, True),
        ([(4, 1), (2, 3)], (False, False), False, False),
    ],
)
def test_closed_forms(norm, shapes, weighted, of_frobenius, of_others):
    configurations = [Configuration(shape, 1) for shape in shapes]
    expected = of_frobenius if norm.is_frobenius else of_others
    assert norm.has_closed_form((4, 6), configurations, weighted) == expected


@pytest.mark.parametrize("has_weights", [False, True])
def test_auto_is_frobenius_under_weights(has_weights):
    expected = "frobenius" if has_weights else "spectral"
    assert str(Norm.for_weights("auto", has_weights)) == expected
    assert str(Norm.for_weights("schatten:4", has_weights)) == "schatten:4"


def test_value_gradient_and_cost_are_those_of_the_stage():
    norm = Norm.parse("schatten:6")
    value, gradient = norm.value_and_gradient(jnp.diag(jnp.array([3.0, 4.0])), 1)
    size = (3**6 + 4**6) ** (1 / 6)
    assert float(value) == pytest.approx(size**2 / 2, rel=1e-6)
    expected = np.diag([3**5, 4**5]) / size**4
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    assert [int(norm.num_products(j)) for j in (-1, 0, 1, 5)] == [2, 2, 3, 7]


def test_the_module_is_imported_without_jax():
    code = "import sys, kronjax.norm as n; n.Norm.parse('spectral').stages(); "
    subprocess.run(
        [sys.executable, "-c", code + "assert 'jax' not in sys.modules"], check=True
    )
