import dataclasses

import jax
import numpy as np
import ports
import pytest
from flax import nnx

from kronjax import nn, recipe
from kronjax.kronecker import Configuration
from kronjax.lm.checkpoints import hugging_face
from kronjax.lm.compression import (
    candidates,
    html,
    mixture,
    pipeline,
    plan,
    record,
)
from kronjax.lm.compression.budget import Budget
from kronjax.lm.compression.moments import is_foreign, measure_moments
from kronjax.lm.models import gpt2, sizes
from kronjax.runs import closed_form, engine
from kronjax.runs.closed_form import LowRank
from kronjax.runs.processes import Hosts
from kronjax.runs.settings import SolveSettings
from kronjax.runs.store import Store

CONFIG = gpt2.Config(n_embd=24, n_layer=2, n_head=2, n_positions=32, vocab_size=40)


RULES = recipe.loads("""
rules:
  - {match: "h.0.attn.c_proj", method: interpolative, fraction: 0.5}
  - {match: "*", method: keep}
""")


@pytest.fixture(scope="module")
def model():
    return gpt2.Model(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 40, 1500).astype(np.int32)


@pytest.fixture(scope="module")
def moments(model, tokens):
    return measure_moments(model, tokens, gradients=True, progress=False)


@pytest.fixture(scope="module")
def result(model, moments, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    done = pipeline.run(model, 0.7, moments, max_products=60, work=work)
    return done, work


def kernels(model):
    return {k: np.asarray(nn.dense(v).kernel[...]) for k, v in layers(model).items()}


def layers(model):
    return {k: v for k, v in nn.linear_layers(model).items() if k != "lm_head"}


def test_a_budget_is_kept_and_every_layer_accounted_for(model, result):
    done, _ = result
    dense = sum(w.size for w in kernels(model).values())
    held = sum(
        nn.cost(layer).parameters - layer.out_features
        for layer in layers(done.model).values()
    )
    assert 0.6 * dense < held <= 0.7 * dense
    assert done.before.parameters - done.after.parameters == dense - held
    assert [one.name for one in done.plan.choices] == list(layers(model))
    changed = {one.name for one in done.layers}
    assert changed == {
        name
        for name, layer in layers(done.model).items()
        if not isinstance(layer, nnx.Linear)
    }


def test_a_result_is_printed_in_few_lines(result):
    done, _ = result
    lines = repr(done).splitlines()
    assert len(lines) <= 10 and "array" not in repr(done)
    assert f"{done.after.parameters:,} of {done.before.parameters:,}" in lines[0]
    assert "predicted damage" in repr(done) and "fit " in lines[-1]
    failed = dataclasses.replace(done.layers[0], status="failed", relative=None)
    several = dataclasses.replace(done, layers=(failed, *done.layers[1:]))
    assert "1 layers failed and stay dense" in repr(several)
    assert len(repr(several).splitlines()) <= 10


def test_damages_are_those_of_the_weights_multiplied_out(model, result, moments):
    done, _ = result
    before, after = kernels(model), kernels(done.model)
    for layer in done.layers:
        error = before[layer.name] - after[layer.name]
        left, right = moments.input(layer.name), moments.output(layer.name)
        damage = np.trace(error.T @ left @ error @ right) / 2
        np.testing.assert_allclose(layer.damage, damage, rtol=2e-2)
        assert layer.relative <= layer.low_rank * (1 + 1e-4)  # never worse than that


def test_the_model_given_is_left_as_it_is(model, result, tokens):
    done, _ = result
    assert all(isinstance(x, nnx.Linear) for x in nn.linear_layers(model).values())
    logits = done.model(tokens[None, :16])
    assert logits.shape == (1, 16, 40)
    assert np.isfinite(logits).all()


def test_the_recipe_of_a_result_makes_the_same_layers(model, result):
    done, _ = result
    rules = recipe.loads(done.model.recipe)
    assert rules == done.recipe
    shapes = {k: (v.in_features, v.out_features) for k, v in layers(model).items()}
    assigned = recipe.resolve(rules, shapes)
    assert [(x.name, x.configurations) for x in assigned] == [
        (x.name, x.configurations) for x in done.layers
    ]


def test_finished_layers_are_taken_from_the_folder_of_the_work(
    model, moments, result, monkeypatch
):
    done, work = result
    files = sorted((work / "fits" / "matrices").glob("*.safetensors"))
    assert len(files) == len(done.layers)
    damaged = files[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    calls = []
    put = Store.put

    def counted(self, task, *arguments):
        calls.append(task.name)
        return put(self, task, *arguments)

    monkeypatch.setattr(Store, "put", counted)
    # Decompositions of the plan are stored, too, for plans of any budget.
    monkeypatch.setattr(closed_form, "_decompose", None)
    again = pipeline.run(model, 0.7, moments, max_products=60, work=work)
    assert len(calls) == 1  # the damaged one
    for name, kernel in kernels(again.model).items():
        np.testing.assert_array_equal(kernel, kernels(done.model)[name])


@pytest.mark.parametrize("method", ["low-rank", "interpolative"])
def test_a_layer_without_weights_is_decomposed_once(model, monkeypatch, method):
    rule = {"match": "*", "method": method, "rank": 2, "weighting": "none"}
    rules = recipe.Recipe.model_validate({"rules": [rule]})
    decomposed, of = [], LowRank.of
    monkeypatch.setattr(LowRank, "of", lambda x: decomposed.append(x.name) or of(x))
    done = pipeline.run(model, rules)
    assert sorted(decomposed) == sorted(layer.name for layer in done.layers)
    for layer in done.layers:
        assert layer.relative == pytest.approx(layer.low_rank, rel=1e-5)
        assert layer.gap is not None and layer.gap < 1e-3


@pytest.mark.parametrize(
    ("names", "weighting", "norm"),
    [
        # A tall kernel is the wide one of the other layer, if both sides have weights.
        (["h.0.mlp.c_fc", "h.0.mlp.c_proj"], "input+gradient", "frobenius"),
        (["h.0.attn.c_proj", "h.1.attn.c_proj"], "input", "frobenius"),
        (["h.0.attn.c_proj", "h.1.attn.c_proj"], "none", "schatten:4"),
    ],
)
def test_layers_of_a_group_are_fitted_as_they_are_alone(
    model, moments, names, weighting, norm
):
    linear = layers(model)
    rules = []
    for name in names:
        shape = linear[name].in_features, linear[name].out_features
        held = mixture.configurations(shape, (2 * (norm == "frobenius"), 3))
        terms = [{"a_shape": x.a_shape, "rank": x.rank} for x in held]
        rule = {"match": name, "method": "kronecker", "terms": terms}
        rules.append({**rule, "norm": norm, "weighting": weighting})

    def fit(rules):
        keep = {"match": "*", "method": "keep"}
        given = recipe.Recipe.model_validate({"rules": [*rules, keep]})
        return pipeline.prepare(
            model, given, moments, settings=SolveSettings(max_products=80)
        )

    together = fit(rules)
    plan_, _ = together.planned()
    (group,) = engine.groups(plan_.tasks, plan_.settings)
    assert [task.name for task in group.tasks] == names
    done = together.run()
    for rule, layer in zip(rules, done.layers, strict=True):
        (alone,) = fit([rule]).run().layers
        assert layer.relative == pytest.approx(alone.relative, rel=1e-3)
        assert layer.configurations == alone.configurations


@pytest.mark.parametrize("sequential", [False, True])
def test_an_embedding_that_a_rule_names_is_compressed_with_its_head(
    model, moments, tokens, sequential
):
    terms = [{"a_shape": (20, 12), "rank": 2}]
    common = {"method": "kronecker", "norm": "frobenius"}
    rules = recipe.Recipe.model_validate(
        {
            "rules": [
                {"match": "wte", "terms": terms, "weighting": "none", **common},
                {"match": "h.0.attn.c_proj", "method": "low-rank", "rank": 3},
            ]
        }
    )
    done = pipeline.run(model, rules, tokens, sequential=sequential)
    first, second = done.layers
    assert (first.name, second.name) == ("wte", "h.0.attn.c_proj")
    assert done.before.parameters - done.after.parameters == (
        40 * 24 - 2 * (20 * 12 + 4) + 24 * 24 - 3 * 48
    )
    assert sizes.count(plan.outline(model, rules)).parameters == done.after.parameters
    table = np.asarray(model.wte.embedding[...])
    left = table - np.asarray(done.model.wte.materialize())
    relative = np.linalg.norm(left) / np.linalg.norm(table)
    assert relative == pytest.approx(first.relative, rel=1e-4) and relative < 1
    twin = nn.multiplied_out(done.model)
    np.testing.assert_allclose(done.model(tokens[None, :8]), twin(tokens[None, :8]),
                               atol=1e-4)  # fmt: skip
    kept = record.of(done, model, source="model")
    rows = {row["name"]: row for row in kept["layers"]}
    assert rows["wte"]["kind"] == "2 × 20x12 ⊗ 2x2" and "wpe" not in rows


def test_a_larger_budget_predicts_less_damage(model, moments, monkeypatch):
    monkeypatch.setattr(candidates, "probe", lambda *_: [])
    damages = [plan.make(model, x, moments).damage for x in (0.3, 0.6, 0.9, 1.0)]
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] == 0


@pytest.mark.parametrize("text", ["13k", "52kB", "25kFLOP"])
def test_budgets_for_the_whole_model(model, moments, monkeypatch, text):
    monkeypatch.setattr(candidates, "probe", lambda *_: [])
    budget = Budget.parse(text)
    made = plan.make(model, budget, moments)
    done = pipeline.run(model, made.recipe(), moments, max_products=4)
    size = dataclasses.asdict(done.after)[budget.measure]
    assert 0.85 * budget.amount < size <= budget.amount


def test_budgets_that_are_impossible_say_so(model, moments, monkeypatch):
    monkeypatch.setattr(candidates, "probe", lambda *_: [])
    with pytest.raises(ValueError, match="leaves nothing for the linear layers"):
        plan.make(model, "1000", moments)
    with pytest.raises(ValueError, match="smallest possible"):
        plan.make(model, 0.01, moments)


def test_rules_and_what_they_need(model, moments, tokens):
    rules = recipe.loads(
        "rules: [{match: 'h.0.attn.c_proj', method: low-rank, rank: 4},"
        " {match: '*', method: keep}]"
    )
    with pytest.raises(ValueError, match="--calibrate FILE"):
        pipeline.compress(model, rules)
    done = pipeline.run(model, rules, moments)
    (layer,) = done.layers
    assert layer.configurations == (Configuration((24, 1), 4),)
    assert layer.status == "svd"
    bare = dataclasses.replace(moments, outputs={})
    with pytest.raises(ValueError, match="without gradients"):
        pipeline.run(model, 0.7, bare, weighting="input+gradient")
    with pytest.raises(ValueError, match="compressed already"):
        pipeline.run(done.model, rules, moments)


@pytest.mark.parametrize(
    ("rules", "text", "options", "message"),
    [
        (RULES, True, {"weighting": "input"}, "says itself how layers are weighted"),
        (0.7, False, {"weighting": "input"}, "weighting needs the text"),
        (0.7, False, {"tokens": 100}, "number of tokens needs the text"),
        (0.7, None, {"tokens": 100}, "number of tokens needs the text"),
        (0.7, None, {"refine": 10}, "refinement needs the text"),
        (0.7, True, {"tokens": 0}, "at least 1"),
        (0.7, True, {"refine": -1}, "must not be negative"),
        (0.7, True, {"weighting": "none", "sequential": True}, "no layer is weighted"),
        (0.7, True, {"num_starts": 2}, "from one start"),
        (0.7, True, {"seed": 1}, "from one start"),
        (RULES, True, {"hosts": Hosts(0, 2), "sequential": True}, "by several"),
        (RULES, True, {"hosts": Hosts(0, 2)}, "give work"),
    ],
)
def test_options_without_effect_are_refused(
    model, tokens, moments, rules, text, options, message
):
    given = {True: tokens, None: moments, False: None}[text]
    with pytest.raises(ValueError, match=message):
        pipeline.run(model, rules, given, **options)


@pytest.mark.parametrize("variant", ["opt", "llama", "gpt2-untied"])
def test_kernels_of_every_port_become_their_best_sums(variant):
    dense = ports.make(variant)
    given = recipe.loads(
        "rules: [{match: '*', method: low-rank, rank: 3, weighting: none}]"
    )
    done = pipeline.run(dense, given)
    before = {k: w for k, w in kernels(dense).items() if k != "lm_head"}
    after = kernels(done.model)
    assert [layer.name for layer in done.layers] == list(before)
    for layer in done.layers:
        s = np.linalg.svd(np.float64(before[layer.name]), compute_uv=False)
        error = np.linalg.norm(before[layer.name] - after[layer.name], 2)
        assert error == pytest.approx(s[3], rel=1e-4)
        assert layer.gap == pytest.approx(0, abs=1e-4)


def test_the_work_of_the_former_engine_is_refused(model, tmp_path):
    former = tmp_path / "layer-00.safetensors"
    former.write_bytes(b"of an earlier version")
    rules = recipe.loads(
        "rules: [{match: h.0.attn.c_proj, method: low-rank, rank: 3, weighting: none},"
        " {match: '*', method: keep}]"
    )
    with pytest.raises(ValueError, match="earlier version .* start anew"):
        pipeline.run(model, rules, work=tmp_path)
    assert former.exists()
    pipeline.run(model, rules, work=tmp_path, force=True)
    pipeline.run(model, rules, work=tmp_path)
    assert not former.exists()


@pytest.mark.parametrize("start", ["rescaled", "pruning", "random"])
def test_starts_of_the_literature(model, start):
    rules = recipe.Recipe(
        rules=(
            recipe.Rule(
                match="h.*.mlp.c_fc",
                method="kronecker",
                terms=(recipe.Term(a_shape=(12, 96)),),
                norm="frobenius",
                weighting="none",
                start=start,
            ),
            recipe.Rule(match="*", method="keep"),
        )
    )
    done = pipeline.run(model, rules)
    before, after = kernels(model), kernels(done.model)
    for layer in done.layers:
        w, k = before[layer.name], after[layer.name]
        if start != "pruning":
            np.testing.assert_allclose(np.linalg.norm(k), np.linalg.norm(w), rtol=1e-4)
        if start == "random":  # and nothing else of the kernel
            assert abs(np.sum(k * w)) < 0.1 * np.linalg.norm(w) ** 2
        if start == "pruning":  # every second row is there as it was
            kept = [np.allclose(k[i::2], w[i::2], atol=1e-6) for i in (0, 1)]
            assert sum(kept) == 1
    if start == "random":
        every = [after[layer.name] for layer in done.layers]
        again = kernels(pipeline.compress(model, rules))
        assert np.array_equal(again[done.layers[0].name], every[0])
        assert not np.allclose(every[0], every[1])


@pytest.mark.parametrize("shape", [(24, 72), (72, 24), (24, 24), (7, 5), (1, 6)])
def test_mixtures_have_the_size_that_was_asked_for(shape):
    for fraction in (0.3, 0.6):
        for part in (0.0, 0.5, 1.0):
            held = mixture.configurations(shape, mixture.mix(shape, fraction, part))
            size = sum(one.num_parameters(shape) for one in held)
            assert size <= fraction * shape[0] * shape[1] + sum(shape)
            ranks = {x.a_shape: x.rank for x in held}
            found = (
                ranks.pop((shape[0], 1), 0),
                ranks.pop(mixture.near_square(shape), 0),
            )
            assert found == mixture.mix(shape, fraction, part) and not ranks


def test_a_layer_of_zeros_costs_nothing_and_breaks_nothing(model, moments, tmp_path):
    hollow = nnx.merge(*nnx.split(model))
    zeros = np.zeros((24, 24), np.float32)
    nn.replace(hollow, "h.0.attn.c_proj", nn.linear(zeros, None))
    hollow.h[0].attn.c_proj.bias = model.h[0].attn.c_proj.bias
    done = pipeline.run(hollow, 0.6, moments, max_products=4)
    found = record.of(done, hollow, source="hollow", timed=False)
    (tmp_path / "out").mkdir()
    record.write(found, tmp_path / "out")
    again = record.read(tmp_path / "out")
    text = html.page(again)
    assert "h.0.attn.c_proj" in text
    assert all(np.isfinite(one.damage) for one in done.plan.choices)


def test_a_page_escapes_what_it_shows_and_survives_a_model_that_diverged(result, model):
    done, _ = result
    found = record.of(done, model, source="<script>alert(1)</script>", timed=False)
    found["jax"] = "<script>"
    nothing = {"protocol": "krony-pt", "perplexity": None}
    found["perplexity"] = {"dense": nothing, "compressed": nothing}
    found["measured_nats"] = None
    text = html.page(found)
    assert "<script>alert" not in text and "jax <script>" not in text
    assert "not finite" in text


def test_damaged_records_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="kronjax compress"):
        record.read(tmp_path)
    for content in ("{", "[]", '{"format": 1}', '{"format": 99}'):
        (tmp_path / record.NAME).write_text(content)
        with pytest.raises(ValueError, match="damaged|update kronjax"):
            record.read(tmp_path)


def test_moments_of_one_model_are_not_taken_for_another(model, tokens, tmp_path):
    other = gpt2.Model(CONFIG, rngs=nnx.Rngs(1))
    for one in (model, other, model):
        pipeline.compress(one, RULES, tokens, work=tmp_path, force=True, progress=False)
    assert len(list(tmp_path.glob("moments-*"))) == 2


def test_terms_that_repeat_a_shape_are_refused(model):
    terms = [{"a_shape": (24, 1), "rank": 2}, {"a_shape": (24, 1), "rank": 3}]
    rule = {"match": "h.0.attn.c_proj", "method": "kronecker", "terms": terms}
    rule |= {"norm": "frobenius", "weighting": "none"}
    rules = [rule, {"match": "*", "method": "keep"}]
    with pytest.raises(ValueError, match="write one"):
        pipeline.run(model, recipe.Recipe.model_validate({"rules": rules}))


def test_refinement_is_refused_before_anything_takes_time(model, tokens):
    with pytest.raises(ValueError, match="9 windows"):
        pipeline.run(model, RULES, tokens[:200], refine=10)
    with pytest.raises(ValueError, match="needs the text"):
        pipeline.run(model, RULES, refine=10)


def test_short_floats_stay_short_and_are_computed_in_long_ones(model, moments):
    short = hugging_face.cast(model, "bfloat16")
    done = pipeline.run(short, RULES, moments)
    stored = {str(x.dtype) for x in jax.tree.leaves(nnx.state(done.model, nnx.Param))}
    assert stored == {"bfloat16"}
    whole = pipeline.run(hugging_face.cast(short, "float32"), RULES, moments)
    assert done.layers[0].relative == whole.layers[0].relative
    assert done.after.bytes * 2 == pytest.approx(whole.after.bytes, rel=0.05)


def test_scalars_of_terms_are_parameters_that_folders_keep(model, tmp_path):
    rules = recipe.loads("""
rules:
  - match: "h.*.mlp.c_fc"
    method: kronecker
    terms: [{a_shape: [4, 6], rank: 2}]
    weighting: none
    norm: frobenius
    scalars: true
  - {match: "*", method: keep}
""")
    done = pipeline.run(model, rules)
    planned = plan.outline(model, rules)
    assert sizes.count(planned).parameters == done.after.parameters
    hugging_face.save(done.model, tmp_path)
    again = hugging_face.load(tmp_path)
    layer = nn.linear_layers(again)["h.0.mlp.c_fc"]
    assert layer.scales[0][...].tolist() == [1, 1]
    np.testing.assert_array_equal(
        layer.materialize(), layers(done.model)["h.0.mlp.c_fc"].materialize()
    )


def test_a_text_that_the_model_cannot_read_is_told(model, moments):
    # Weights at random read no text; the better a model, the lower its loss.
    assert is_foreign(model, moments)
    assert not is_foreign(model, dataclasses.replace(moments, nll=1.0))
    assert not is_foreign(model, dataclasses.replace(moments, nll=None))


def test_in_sequence_later_blocks_see_what_earlier_ones_hand_on(model, tokens):
    rules = recipe.loads("""
rules:
  - {match: "h.*.mlp.c_fc", method: low-rank, rank: 2, weighting: input}
  - {match: "*", method: keep}
""")
    given = dict(tokens=1024, progress=False)
    at_once = pipeline.run(model, rules, tokens, **given)
    in_turn = pipeline.run(model, rules, tokens, sequential=True, **given)
    first, second = (
        kernels(at_once.model)[name] - kernels(in_turn.model)[name]
        for name in ("h.0.mlp.c_fc", "h.1.mlp.c_fc")
    )
    # Nothing comes before the first block; the second sees other inputs.
    assert np.abs(first).max() < 1e-4 < np.abs(second).max()
    shrunk = measure_moments(in_turn.model, tokens[:1025], progress=False)
    error = kernels(model)["h.1.mlp.c_fc"] - kernels(in_turn.model)["h.1.mlp.c_fc"]
    other = kernels(model)["h.1.mlp.c_fc"] - kernels(at_once.model)["h.1.mlp.c_fc"]
    ours, theirs = (
        np.trace(x.T @ shrunk.input("h.1.mlp.c_fc") @ x) for x in (error, other)
    )
    assert ours < theirs  # nearer on what the compressed model hands on
    with pytest.raises(ValueError, match="in sequence needs the text"):
        pipeline.run(model, rules, shrunk, sequential=True)


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "low-rank", "rank": 12},  # exactly as many as the kernel
        {"method": "kronecker", "terms": [{"a_shape": (24, 24)}]},
        # Fewer parameters by 16, and an order of 24 integers.
        {"method": "interpolative", "rank": 20},
    ],
)
def test_a_layer_that_would_not_shrink_stays_dense_and_is_listed(model, rule):
    given = {"match": "h.0.attn.c_proj", "weighting": "none", **rule}
    other = {"match": "h.1.attn.c_proj", "weighting": "none", "method": "low-rank"}
    keep = {"match": "*", "method": "keep"}
    rules = recipe.Recipe.model_validate({"rules": [given, {**other, "rank": 2}, keep]})
    done = pipeline.run(model, rules, progress=False)
    first, second = done.layers
    assert (first.name, first.status) == ("h.0.attn.c_proj", "dense")
    assert "would replace 2,304" in first.reason and second.status == "svd"
    assert isinstance(layers(done.model)["h.0.attn.c_proj"], nnx.Linear)
    assert not done.failed
    rows = {x["name"]: x for x in record.of(done, model, source="")["layers"]}
    assert rows["h.0.attn.c_proj"]["reason"] == first.reason
    assert rows["h.0.attn.c_proj"]["bytes"] == rows["h.0.attn.c_proj"]["dense_bytes"]
    assert rows["h.1.attn.c_proj"]["bytes"] < rows["h.1.attn.c_proj"]["dense_bytes"]
    outline = sizes.count(plan.outline(model, rules))
    assert outline.bytes == done.after.bytes
