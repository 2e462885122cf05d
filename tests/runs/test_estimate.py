"""Estimates of the time of fits, which a trial measures."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronjax import methods, recipe
from kronjax.io.storage import MemoryFolder
from kronjax.kronecker import KroneckerTerms
from kronjax.runs import engine, estimate, factorize, joint
from kronjax.runs.settings import SolveSettings
from kronjax.runs.store import Store
from kronjax.solver.descent import Status


def estimated(rule, count, shape, **settings):
    """Return the estimate for matrices of one rule."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((count, *shape)).astype(np.float32)
    matrices = {f"w.{i}": matrix for i, matrix in enumerate(draws)}
    rules = recipe.loads(f"rules: [{rule}]")
    plan, _ = factorize.planned(matrices, rules, SolveSettings(**settings))
    store = Store(MemoryFolder(), plan)
    (found,) = estimate.of(engine.Inputs(matrices), store, jax.devices()[:1])
    return found


@pytest.fixture
def clock(monkeypatch):
    """The clock of the estimates, which stands still until a test puts it forward."""
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(
        estimate, "time", SimpleNamespace(perf_counter=lambda: clock.seconds)
    )
    return clock


class Slow(methods.Method):
    """A method that takes longer when it is called first, as if it compiled."""

    name, required = "slow", ("rank",)

    def __init__(self, clock):
        self.clock, self.calls = clock, 0

    def num_parameters(self, rule, shape):
        return rule.rank

    def fit(self, kernel, left, right, rule):
        self.calls += 1
        self.clock.seconds += 0.5 if self.calls == 1 else 0.1
        return {"whole": kernel}

    def matrix(self, factors):
        return factors["whole"]


def test_the_time_of_a_method_is_that_of_fits_without_compilation(monkeypatch, clock):
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    slow = Slow(clock)
    methods.register(slow)
    rule = "{match: '*', method: slow, rank: 2, weighting: none}"
    found = estimated(rule, 11, (9, 8))
    assert slow.calls == 2
    assert found.seconds == pytest.approx(0.5 + 10 * 0.1)


def test_the_time_of_joint_fits_grows_with_their_products(monkeypatch, clock):
    spent = []

    def fit_all(prepared, configurations, *, max_products, tolerance):
        spent.append(max_products)
        clock.seconds += 0.3 * (len(spent) == 1) + 0.01 * max_products
        terms = tuple(
            KroneckerTerms(
                jnp.zeros((x.rank, *x.a_shape)),
                jnp.zeros((x.rank, *x.b_shape((6, 8)))),
            )
            for x in configurations[0]
        )
        return [joint.Joint(terms, 1.0, Status.CONVERGED, max_products)]

    monkeypatch.setattr(joint, "fit_all", fit_all)
    terms = "[{a_shape: [3, 2], rank: 1}, {a_shape: [6, 1], rank: 1}]"
    rule = "{match: '*', method: kronecker, norm: frobenius, weighting: none, terms: "
    found = estimated(f"{rule}{terms}}}", 5, (6, 8), max_products=100)
    assert spent == [8, 8, 40]
    assert found.seconds == pytest.approx(0.3 + 5 * 1.0)
