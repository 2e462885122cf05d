"""Plans: the same for the same rules and numbers, another one for any other."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax import recipe
from kronjax.runs import factorize
from kronjax.runs.plan import RunPlan, differences, make
from kronjax.runs.settings import SolveSettings

RULES = """
rules:
- match: "*.w"
  method: kronecker
  terms: [{a_shape: [2, 3], rank: 2}]
  weighting: none
- {match: "*.v", method: low-rank, rank: 2, weighting: none}
"""


def tensors(count=12):
    rng = np.random.default_rng(0)
    found = {f"h.{i}.w": rng.standard_normal((4, 6)) for i in range(count)}
    found |= {f"h.{i}.v": rng.standard_normal((6, 4)) for i in range(count)}
    return {**found, "h.0.bias": np.ones(6), "ids": np.ones((4, 6), int)}


def planned(some=None, rules=RULES, **settings):
    some = tensors() if some is None else some
    plan, _ = factorize.planned(some, recipe.loads(rules), SolveSettings(**settings))
    return plan


@given(st.integers(0, 2**16))
def test_a_plan_is_the_same_in_whatever_order_tensors_come(seed):
    some = list(tensors().items())
    random.Random(seed).shuffle(some)
    assert planned(dict(some)) == planned()
    assert planned(dict(some)).hash == planned().hash


def test_tasks_come_with_numbers_as_numbers_and_know_what_they_need():
    plan = planned()
    assert [one.index for one in plan.tasks] == list(range(24))
    assert [one.name for one in plan.tasks[:2]] == ["h.0.v", "h.0.w"]
    assert plan.tasks[-1].name == "h.11.w"
    assert [one.is_low_rank for one in plan.tasks[:2]] == [True, False]
    assert plan.parameters == 24 * 24 + 6 + 24
    assert plan.saved == 12 * (24 - 2 * (6 + 4)) + 12 * (24 - 2 * 10)
    assert {one.precision for one in plan.tasks} == {"float64"}


def test_a_plan_comes_back_from_its_json():
    plan = planned(tolerance=1e-3)
    again = RunPlan.of_json(plan.to_json(), "plan.json")
    assert again == plan and again.hash == plan.hash
    assert differences(plan, again) == ["the order of the matrices"]


def changed_numbers():
    some = tensors()
    some["h.3.w"] = some["h.3.w"].copy()
    some["h.3.w"][0, 0] += 1e-9
    return planned(some)


def without_one():
    some = tensors()
    del some["h.3.w"], some["h.4.w"]
    return planned(some)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (changed_numbers, "h.3.w holds other numbers"),
        (without_one, "h.3.w and 1 more: gone"),
        (lambda: planned(tensors(13)), "h.12.v and 1 more: new"),
        (lambda: planned(tolerance=0.1), "tolerance was 0.01, now 0.1"),
        (lambda: planned(seed=1), "seed was 0, now 1"),
        (
            lambda: planned(rules=RULES.replace("3], rank: 2", "3], rank: 1")),
            "configurations of h.0.w was 2x3, 2, now 2x3, 1",
        ),
        (
            lambda: planned(
                rules=RULES.replace("rank: 2, w", "rank: 2, norm: frobenius, w")
            ),
            "norm of h.0.v was spectral, now frobenius",
        ),
    ],
)
def test_whatever_decides_the_results_changes_the_hash_and_is_named(other, says):
    plan, other = planned(), other()
    assert plan.hash != other.hash
    assert says in differences(plan, other)


def test_how_a_pattern_is_written_changes_nothing():
    assert planned(rules=RULES.replace('"*.w"', '"h.*.w"')).hash == planned().hash


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "damaged"),
        (planned().to_json()[:-40], "damaged"),
        (planned().to_json().replace(b'"rank": 2', b'"rank": 1', 1), "hash"),
        (b"[]", "damaged"),
        (b'{"format": 3}', "damaged"),
        (json.dumps({"format": 2}).encode(), "earlier version.*start anew"),
        (json.dumps({"format": 4}).encode(), "update kronjax"),
        (b"[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_or_later_plan_is_refused(content, says):
    with pytest.raises(ValueError, match=says):
        RunPlan.of_json(content, "plan.json")


@pytest.mark.parametrize(
    ("match", "says"),
    [
        ("h.*.x", r"matches no layer; layers are named like"),
        ("h.0.bias", r"matches no matrix: h.0.bias is a tensor of shape \(6,\)"),
        (
            "ids",
            r"matches no matrix: ids is a tensor of shape \(4, 6\) and dtype int64",
        ),
    ],
)
def test_a_rule_that_matches_no_matrix_is_refused(match, says):
    rules = RULES + f"- {{match: '{match}', method: keep}}"
    with pytest.raises(ValueError, match=says):
        planned(rules=rules)


def test_rules_that_need_a_text_or_training_are_refused():
    for old, new in (
        ("weighting: none", "weighting: input"),
        ("rank: 2, w", "rank: 2, start: pruning, w"),
    ):
        with pytest.raises(ValueError, match="needs a language model that runs on a"):
            planned(rules=RULES.replace(old, new))


def test_all_rules_that_match_a_name_are_told():
    rules = recipe.loads(RULES + "- {match: '*', method: keep}")
    found = recipe.matches(rules, ["a.w", "b"])
    assert found == {"a.w": [0, 2], "b": [2]}


@pytest.mark.parametrize("tolerance", [0.0, -1.0, np.nan, np.inf])
def test_a_tolerance_is_positive(tolerance):
    with pytest.raises(ValueError, match="must be positive"):
        SolveSettings(tolerance)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_starts": 0}, "num_starts is 0"),
        ({"max_products": 0}, "max_products is 0"),
    ],
)
def test_counts_of_settings_are_positive(settings, says):
    with pytest.raises(ValueError, match=says):
        SolveSettings(**settings)


def test_weights_are_part_of_the_plan():
    matrices = {"w": np.eye(4, 6)}
    rule = "{match: w, method: low-rank, rank: 1}"
    assigned = recipe.resolve(recipe.loads(f"rules: [{rule}]"), {"w": (4, 6)})
    plain = make(assigned, matrices)
    weighted = make(assigned, matrices, weights={"w": (np.eye(4), None)})
    assert [x.tasks[0].weighted for x in (plain, weighted)] == [
        (False, False),
        (True, False),
    ]
    # "auto" is the Frobenius norm under weights.
    assert [x.tasks[0].norm for x in (plain, weighted)] == ["spectral", "frobenius"]
    other = make(assigned, matrices, weights={"w": (2 * np.eye(4), None)})
    assert len({plain.hash, weighted.hash, other.hash}) == 3
    assert RunPlan.of_json(weighted.to_json(), "plan.json") == weighted
