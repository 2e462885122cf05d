"""Rules over names: matching, refusals and counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax import patterns, recipe
from kronjax.kronecker import Configuration

GPT2 = {
    f"h.{i}.{name}": shape
    for i in range(12)
    for name, shape in {
        "attn.c_attn": (768, 2304),
        "attn.c_proj": (768, 768),
        "mlp.c_fc": (768, 3072),
        "mlp.c_proj": (3072, 768),
    }.items()
}
TABLES = {"wte": (50257, 768), "wpe": (1024, 768)}
DENSE = 124_439_808
OPT = {
    f"layers.{i}.{name}": shape
    for i in range(12)
    for name, shape in {
        "fc1": (768, 3072),
        "fc2": (3072, 768),
        **{f"self_attn.{x}_proj": (768, 768) for x in ("k", "out", "q", "v")},
    }.items()
}


def matched(pattern, names=GPT2):
    rules = recipe.Recipe(
        rules=(recipe.Rule(match=pattern, method="low-rank", rank=1),)
    )
    return [x.name for x in recipe.resolve(rules, names)]


@pytest.mark.parametrize(
    ("pattern", "blocks", "kinds"),
    [
        ("*", range(12), 4),
        ("h.*.mlp.*", range(12), 2),
        ("h.{0..5}.mlp.c_fc", range(6), 1),
        ("h.{odd}.attn.*", range(1, 12, 2), 2),
        ("h.{even}.attn.c_attn", range(0, 12, 2), 1),
        ("h.{early}.*", range(4), 4),
        ("h.{middle}.*", range(4, 8), 4),
        ("h.{late}.*", range(8, 12), 4),
        ("h.1?.mlp.c_{fc,proj}", (10, 11), 2),
        ("h.{10..99}.*", (10, 11), 4),
    ],
)
def test_patterns_match_names(pattern, blocks, kinds):
    names = matched(pattern)
    assert sorted({int(name.split(".")[1]) for name in names}) == list(blocks)
    assert len(names) == len(list(blocks)) * kinds


def test_targets_is_a_synonym_of_match():
    rule = "method: low-rank, rank: 1"
    targets = recipe.loads(f"rules: [{{targets: 'h.*.mlp.*', {rule}}}]")
    assert targets == recipe.loads(f"rules: [{{match: 'h.*.mlp.*', {rule}}}]")
    assert recipe.loads(recipe.dumps(targets)) == targets
    with pytest.raises(ValueError, match="write one of them"):
        recipe.loads(f"rules: [{{targets: '*', match: '*', {rule}}}]")


def test_ignored_layers_go_to_later_rules_or_stay_dense():
    rules = recipe.loads(
        """
        ignore: [lm_head, "h.0.*"]
        rules:
          - {match: "*", ignore: ["*.mlp.*", "h.1.*"], method: low-rank, rank: 1}
          - {match: "h.*.c_fc", method: low-rank, rank: 2}
        """
    )
    assert recipe.loads(recipe.dumps(rules)) == rules
    found = {x.name: x.configurations[0].rank for x in recipe.resolve(rules, GPT2)}
    blocks = range(1, 12)
    assert found == {f"h.{i}.mlp.c_fc": 2 for i in blocks} | {
        f"h.{i}.attn.{x}": 1 for i in blocks[1:] for x in ("c_attn", "c_proj")
    }
    matched = recipe.matches(rules, ["h.0.fc", "h.1.fc", "h.2.c_fc"])
    assert matched == {"h.0.fc": [], "h.1.fc": [], "h.2.c_fc": [0, 1]}
    everything = rules.model_copy(update={"ignore": "h.*"})
    with pytest.raises(ValueError, match="decides nothing: .* ignored"):
        recipe.resolve(everything, GPT2)


def test_an_ignored_embedding_stays_dense():
    rule = "{match: [wte, 'h.0.*'], method: low-rank, rank: 2, weighting: none}"
    rules = recipe.loads(f"{{rules: [{rule}], ignore: w*}}")
    found = recipe.resolve(rules, GPT2, tables=TABLES)
    assert {x.name.split(".")[0] for x in found} == {"h"}


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"did you mean low-rank\? .*kronecker"):
        recipe.loads("rules: [{match: '*', method: lowrank, rank: 1}]")


@given(blocks=st.integers(1, 40))
def test_early_middle_and_late_partition_the_blocks(blocks):
    names = {f"h.{i}.fc": (4, 4) for i in range(blocks)}
    parts = []
    for word in ("early", "middle", "late"):
        try:
            parts += matched(f"h.{{{word}}}.fc", names)
        except ValueError:
            assert blocks < 3  # a third can be empty
    assert parts == list(names)


def test_any_name_can_be_matched():
    assert patterns.matching("*", ["a\nb", ""]) == ["a\nb", ""]
    assert patterns.matching("a?b", ["a\nb", "ab"]) == ["a\nb"]


def test_a_dot_in_a_pattern_matches_only_a_dot():
    with pytest.raises(ValueError, match="matches no layer"):
        matched("h.0.mlpxc_fc")
    assert matched("h.0.mlp.c_fc", {"h.0.mlp.c_fc": (4, 4), "h.0xmlp.c_fc": (4, 4)})


def test_the_first_rule_that_matches_decides():
    rules = recipe.loads(
        """
        rules:
          - {match: "h.{0..1}.*", method: keep}
          - {match: "h.*.mlp.*", method: low-rank, fraction: 0.5}
          - match: ["h.*.attn.c_attn", "h.*.attn.c_proj"]
            method: kronecker
            terms: [{a_shape: [24, 32], rank: 3}, {a_shape: [768, 1], rank: 2}]
        """
    )
    found = {x.name: x for x in recipe.resolve(rules, GPT2)}
    assert len(found) == 40 and "h.0.mlp.c_fc" not in found
    assert found["h.2.mlp.c_fc"].configurations == (Configuration((768, 1), 307),)
    assert found["h.2.mlp.c_fc"].num_parameters <= 768 * 3072 / 2
    mixed = found["h.5.attn.c_proj"]
    assert mixed.configurations[0] == Configuration((24, 32), 3)
    assert mixed.num_parameters == 3 * (24 * 32 + 32 * 24) + 2 * 2 * 768


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: [", "not YAML"),
        ("[]", "not a mapping"),
        ("rules: []\nmore: 1", "more: Extra inputs"),
        ("rules: [{match: '*', method: magic}]", "rules.0.method"),
        ("rules: [{match: '*', method: low-rank}]", "either rank or fraction"),
        ("rules: [{match: '*', method: kronecker}]", "takes terms"),
        ("rules: [{match: '*', method: keep, rank: 1}]", "neither terms"),
        ("rules: [{match: '*', method: keep, scalars: true}]", "nor scalars"),
        ("rules: [{match: '*', method: low-rank, rank: 0}]", "greater than or equal"),
        ("rules: [{match: '*', method: low-rank, fraction: 1}]", "less than 1"),
        ("rules: [{match: '*', method: low-rank, rank: 1, norm: l1}]", "norm"),
    ],
)
def test_malformed_recipes_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        recipe.loads(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: [{match: 'x.*', method: keep}]", "matches no layer; layers are named"),
        (
            "rules: [{match: '*', method: keep}, {match: 'h.0.*', method: keep}]",
            "rules before it",
        ),
        (
            "rules: [{match: '*', method: kronecker, terms: [{a_shape: [5, 1]}]}]",
            "5 is not a divisor of its 768 rows",
        ),
        ("rules: [{match: 'h.*', method: low-rank, rank: 769}]", "768 that is exact"),
        ("{rules: [{match: '*', method: keep}], model_type: opt}", "for opt"),
    ],
)
def test_recipes_that_do_not_fit_a_model_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        recipe.resolve(recipe.loads(text), GPT2, model_type="gpt2")


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("kronypt-67m", 67_893_504),
        ("kronypt-81m", 81_972_576),
        ("kronypt-96m", 96_128_304),
        ("kronypt-80m", DENSE - 24 * (768 * 3072 - 2 * (1024 * 256 + 9))),
        ("kronypt-92m", DENSE - 24 * (768 * 3072 - 4 * (1024 * 256 + 10))),
    ],
)
def test_recipes_of_the_literature_have_the_published_sizes(name, total):
    found = recipe.resolve(recipe.load(name), GPT2, model_type="gpt2")
    assert len(found) == 24
    saved = sum(x.shape[0] * x.shape[1] - x.num_parameters for x in found)
    assert DENSE - saved == total


def test_recipes_for_every_second_block_have_the_published_sizes():
    """Without a head KnGPT2 and TQCompressedGPT2 are 83M and 81M."""
    for name, total in (("kngpt2", 83.9e6), ("tqcompressedgpt2", 81.3e6)):
        table, *found = recipe.resolve(recipe.load(name), GPT2, tables=TABLES)
        saved = sum(x.shape[0] * x.shape[1] - x.num_parameters for x in [table, *found])
        assert table.name == "wte"
        assert {x.name.split(".")[1] for x in found} == set("13579") | {"11"}
        assert DENSE - saved == pytest.approx(total, rel=2e-3)


def test_an_embedding_is_matched_by_its_exact_name_only():
    every = recipe.loads("rules: [{match: '*', method: low-rank, rank: 2}]")
    found = recipe.resolve(every, GPT2, tables=TABLES)
    assert {x.name for x in found} == set(GPT2)
    both = recipe.loads(
        "rules: [{match: [wte, 'h.0.mlp.*'], method: low-rank, rank: 2, "
        "weighting: none}]"
    )
    found = recipe.resolve(both, GPT2, tables=TABLES)
    assert [x.name for x in found] == ["wte", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    rules = "rules: [{match: '*', method: keep}, {match: wte, method: keep}]"
    matched = recipe.matches(recipe.loads(rules), ["h.0.fc"], ["wte"])
    assert matched == {"h.0.fc": [0], "wte": [1]}
    weighted = recipe.loads("rules: [{match: wte, method: low-rank, rank: 2}]")
    with pytest.raises(ValueError, match="no inputs to weight by"):
        recipe.resolve(weighted, GPT2, tables=TABLES)
    with pytest.raises(
        ValueError, match="wte matches no layer; layers are named like h"
    ):
        recipe.resolve(weighted, GPT2)


def test_three_of_four_terms_store_three_quarters():
    found = recipe.resolve(recipe.load("procrustesgpt-opt-125m"), OPT, model_type="opt")
    assert {x.name for x in found} == {x for x in OPT if "v_proj" not in x}
    for x in found:
        whole = x.shape[0] * x.shape[1]
        assert x.num_parameters == whole * 3 // 4 + 3 * 4


@pytest.mark.parametrize("name", sorted(recipe.builtin()))
def test_every_builtin_recipe_can_be_read_and_written(name):
    read = recipe.load(name)
    assert read.name == name and read.source
    assert recipe.loads(recipe.dumps(read)) == read
    shapes = OPT if read.model_type == "opt" else GPT2
    assert recipe.resolve(read, shapes, tables=TABLES)


def test_a_misspelt_recipe_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(OSError, match="did you mean kronypt-81m"):
        recipe.load("kronypt81m")
    (tmp_path / "a.yaml").write_text("rules: [{match: '*', method: keep}]")
    assert recipe.load(tmp_path / "a.yaml").rules[0].method == "keep"
