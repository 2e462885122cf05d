"""A compression method that is defined outside of the package, in one class."""

import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kronjax import lm, methods, nn, recipe
from kronjax.cli.main import main
from kronjax.lm.compression import pipeline, plan, record
from kronjax.lm.models import sizes
from kronjax.methods import Method


class Columns(Method):
    """Keep the `rank` columns of the kernel with the largest norms; zero the rest."""

    name, required = "columns", ("rank",)

    def num_parameters(self, rule, shape):
        if rule.rank > shape[1]:
            raise ValueError(f"rank {rule.rank} is more than {shape[1]} columns")
        return rule.rank * shape[0]

    def fit(self, kernel, left, right, rule):
        root = 1.0 if left is None else np.linalg.cholesky(left).T
        norms = np.linalg.norm(root @ kernel if left is not None else kernel, axis=0)
        kept = np.sort(np.argsort(-norms, kind="stable")[: rule.rank])
        width = np.array(kernel.shape[1])
        return {"columns": kernel[:, kept], "kept": kept, "width": width}

    def matrix(self, factors):
        matrix = np.zeros((len(factors["columns"]), int(factors["width"])))
        matrix[:, factors["kept"]] = factors["columns"]
        return matrix

    def layer(self, factors, dense, dtype, rule):
        kernel = self.matrix(factors)
        mask = np.zeros(kernel.shape, bool)
        mask[:, factors["kept"]] = True
        bias = nn.as_layer(dense).bias_value
        return nn.MaskedLinear(jnp.asarray(kernel, dtype), jnp.asarray(mask), bias)


RULES = """
rules:
  - {targets: "h.*.mlp.c_fc", method: columns, rank: 5, weighting: none}
  - {match: "*", method: keep}
"""
NAMES = ["h.0.mlp.c_fc", "h.1.mlp.c_fc"]


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    """Register the method for the time of a test."""
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    return methods.register(Columns())


def largest(kernel, count):
    """The kernel with all but the largest columns set to zero."""
    kept = np.argsort(-np.linalg.norm(kernel, axis=0), kind="stable")[:count]
    return np.where(np.isin(np.arange(kernel.shape[1]), kept), kernel, 0)


def test_a_method_is_one_short_class():
    assert len(inspect.getsource(Columns).splitlines()) <= 60


def test_recipes_know_the_method_and_its_fields():
    shapes = {"h.0.mlp.c_fc": (8, 32), "h.0.attn.c_proj": (8, 8)}
    rules = recipe.loads(RULES)
    assert recipe.loads(recipe.dumps(rules)) == rules
    (assignment,) = recipe.resolve(rules, shapes)
    assert assignment.configurations == () and assignment.num_parameters == 40
    for text, words in (
        ("rules: [{match: '*', method: colums, rank: 1}]", "did you mean columns"),
        ("rules: [{match: '*', method: columns}]", "takes rank, and neither terms nor"),
        ("rules: [{match: '*', method: columns, fraction: 0.5}]", "takes rank"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe.loads(text)
    with pytest.raises(ValueError, match="more than 32 columns"):
        many = RULES.replace("rank: 5", "rank: 33")
        recipe.resolve(recipe.loads(many), shapes)
    with pytest.raises(ValueError, match="wte is an embedding"):
        wte = RULES.replace("h.*.mlp.c_fc", "wte")
        recipe.resolve(recipe.loads(wte), shapes, tables={"wte": (40, 8)})


def test_a_model_with_the_method_is_counted_saved_loaded_and_exported(dense, tmp_path):
    rules = recipe.loads(RULES)
    small = nnx.merge(*nnx.split(dense))
    for assignment in plan.resolve(rules, dense):
        method, name, rule = assignment.method, assignment.name, assignment.rule
        old = nn.linear_layers(dense)[name]
        kernel = np.asarray(old.kernel[...])
        factors = method.fit(kernel, None, None, rule)
        np.testing.assert_array_equal(method.matrix(factors), largest(kernel, 5))
        nn.replace(small, name, method.layer(factors, old, jnp.float32, rule))
    tokens = np.arange(12)[None]
    expected = np.asarray(small(tokens))
    assert not np.allclose(expected, dense(tokens))
    planned, counted = sizes.count(plan.outline(dense, rules)), sizes.count(small)
    assert planned == counted
    kernels = sum(nn.cost(nn.linear_layers(small)[x]).parameters - 32 for x in NAMES)
    assert kernels == sum(x.num_parameters for x in plan.resolve(rules, dense))
    lm.save(small, tmp_path / "small")
    back = lm.load(tmp_path / "small")
    np.testing.assert_array_equal(np.asarray(back(tokens)), expected)
    assert sizes.count(back) == counted
    lm.export(back, tmp_path / "dense")
    np.testing.assert_allclose(lm.load(tmp_path / "dense")(tokens), expected, atol=1e-5)


def test_moments_of_the_inputs_decide_which_columns_stay(columns):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 6))
    left = np.diag([1e4, 1.0, 1.0, 1.0])
    (rule, *_) = recipe.loads(RULES.replace("rank: 5", "rank: 1")).rules
    factors = columns.fit(kernel, left, None, rule)
    assert factors["kept"].tolist() == [np.argmax(np.abs(kernel[0]))]


def test_the_command_line_plans_with_the_method(dense, tmp_path, capsys):
    lm.save(dense, tmp_path / "dense")
    (tmp_path / "rules.yaml").write_text(RULES)
    given = ["plan", tmp_path / "dense", "--recipe", tmp_path / "rules.yaml", "--json"]
    assert main([str(x) for x in given]) == 0
    layers = {x["name"]: x for x in json.loads(capsys.readouterr().out)["layers"]}
    assert layers["h.0.mlp.c_fc"]["kind"] == "masked"
    assert layers["h.0.mlp.c_fc"]["parameters"] == 5 * 8 + 32


def test_compression_and_reports_work_with_the_method(dense, tmp_path, capsys):
    rules = recipe.loads(RULES)
    done = pipeline.run(dense, rules)
    old, new = nn.linear_layers(dense), nn.linear_layers(done.model)
    for name in NAMES:
        expected = largest(np.asarray(old[name].kernel[...]), 5)
        np.testing.assert_allclose(nn.materialize(new[name]), expected, atol=1e-6)
    assert [x.name for x in done.layers] == NAMES
    assert all(x.parameters == 5 * 8 and 0 < x.relative < 1 for x in done.layers)
    assert all(x.gap is None and x.status == "columns" for x in done.layers)
    assert "2 layers compressed" in repr(done) and "array" not in repr(done)
    compressed = lm.compress(dense, rules)
    assert sizes.count(compressed) == done.after
    rows = record.of(done, dense, source="model", timed=False)["layers"]
    kinds = {row["name"]: row["kind"] for row in rows}
    assert [name for name, kind in kinds.items() if kind == "masked"] == NAMES


def test_the_command_line_compresses_with_the_method(dense, tmp_path, capsys):
    lm.save(dense, tmp_path / "dense")
    (tmp_path / "rules.yaml").write_text(RULES)
    out = tmp_path / "small"

    def run(*args):
        code = main([str(x) for x in args])
        found = capsys.readouterr()
        assert code == 0, found.err
        return found.out

    given = ("--recipe", tmp_path / "rules.yaml", "--out", out)
    plan = json.loads(
        run("compress", tmp_path / "dense", *given, "--dry-run", "--json")
    )
    assert [group["names"] for group in plan["groups"]] == [NAMES]
    found = json.loads(run("compress", tmp_path / "dense", *given, "--json"))
    assert found["after"]["parameters"] == plan["after"]
    rows = {x["name"]: x for x in found["layers"]}
    assert all(rows[x]["kind"] == "masked" and rows[x]["gap"] is None for x in NAMES)
    assert json.loads(run("report", out, "--json")) == found
    assert "report.html shows every layer" in run("report", out)
    small = lm.load(out)
    assert recipe.loads(small.recipe) == recipe.loads(RULES)
    whole = lm.compress(dense, recipe.loads(RULES))
    tokens = np.arange(12)[None]
    expected = np.asarray(whole(tokens))
    np.testing.assert_array_equal(np.asarray(small(tokens)), expected)
    run("export", out, tmp_path / "export")
    again = lm.load(tmp_path / "export")
    assert all(isinstance(x, nnx.Linear) for x in nn.linear_layers(again).values())
    np.testing.assert_allclose(again(tokens), expected, atol=1e-5)
