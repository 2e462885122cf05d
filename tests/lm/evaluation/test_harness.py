"""The adapter for lm-evaluation-harness, alone and inside the harness."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import losses_reference

from kronjax import lm
from kronjax.lm.evaluation import harness
from kronjax.lm.models import generation

SENTENCE = "She sells sea shells by the sea shore"


def total(model, before, after):
    """Return the log-likelihood of `after` by one forward pass, and if it is greedy."""
    losses, greedy = losses_reference(model, np.array([*before, *after], np.int32))
    count = len(after)
    return -losses[-count:].sum(), bool(greedy[-count:].all())


def test_loglikelihoods_equal_the_reference(tiny):
    adapter = harness.Adapter(tiny, batch=2)
    pairs = [("She sells", " sea shells"), ("", "A journey"), ("The quick  ", "fox")]
    results = adapter.loglikelihood(pairs)
    for pair, (value, greedy) in zip(pairs, results, strict=True):
        expected = total(tiny, *adapter.encode_pair(*pair))
        assert value == pytest.approx(expected[0], rel=1e-4)
        assert greedy == expected[1]


@pytest.mark.parametrize(
    ("context", "continuation", "before", "after"),
    [
        ("She", " sells", "She", " sells"),
        ("She ", "sells", "She", " sells"),
        ("She  ", " sells", "She", "   sells"),
        ("", "sells", None, "sells"),
        ("  ", "sells", None, "  sells"),
        ("", "<|endoftext|>sells", None, "sells"),
    ],
)
def test_spaces_belong_to_the_continuation(tiny, context, continuation, before, after):
    adapter = harness.Adapter(tiny)
    pair = adapter.encode_pair(context, continuation)
    end = tiny.tokenizer.eos
    encoded = [end] if before is None else tiny.tokenizer.encode(before).tolist()
    assert pair == (encoded, tiny.tokenizer.encode(after).tolist())


def test_the_end_of_a_long_context_is_kept(tiny):
    adapter = harness.Adapter(tiny, max_length=12)
    before, after = adapter.encode_pair(SENTENCE * 9, " and shells")
    [(value, _)] = adapter.loglikelihood([(SENTENCE * 9, " and shells")])
    kept = before[len(before) + len(after) - 13 :]
    assert value == pytest.approx(total(tiny, kept, after)[0], rel=1e-4)
    with pytest.raises(ValueError, match="more than the 12 positions to use"):
        adapter.loglikelihood([("a", SENTENCE * 9)])


@pytest.mark.parametrize("count", [0, 1, 5, 7, 8, 9, 20])
def test_windows_score_each_token_once(count):
    tokens = list(range(1, count + 1))
    pairs = list(harness.windows(tokens, 0, most=7))
    assert [token for _, after in pairs for token in after] == tokens
    for before, after in pairs:
        whole = [*before, *after]
        assert before
        assert whole == list(range(whole[0], whole[0] + len(whole)))
        assert len(whole) == min(8, count + 1)


def test_the_loglikelihood_of_a_long_text_is_the_sum_over_windows(tiny):
    adapter = harness.Adapter(tiny, max_length=16)
    tokens = tiny.tokenizer.encode(SENTENCE * 3).tolist()
    pairs = list(harness.windows(tokens, tiny.tokenizer.eos, most=16))
    assert len(pairs) > 2
    [value, empty] = adapter.loglikelihood_rolling([SENTENCE * 3, ""])
    assert value == pytest.approx(sum(total(tiny, *p)[0] for p in pairs), rel=1e-4)
    assert empty == 0


def test_texts_are_continued_up_to_an_ending(tiny):
    adapter = harness.Adapter(tiny, batch=2)
    prompts = ["She sells", "A journey of", "The"]
    plain = lm.generate(tiny, prompts, max_new_tokens=12)
    settings = {"max_gen_toks": 12, "do_sample": False}
    texts = adapter.generate_until([(prompt, settings) for prompt in prompts])
    assert texts == plain
    text = plain[0]
    ending = text[len(text) // 2 :][:2]
    requests = [
        (prompts[0], settings | {"until": ending}),
        (prompts[1], settings | {"until": ["\0", ""]}),
        (prompts[0], settings | {"until": [text[1:], ending]}),
    ]
    assert adapter.generate_until(requests) == [
        text.split(ending)[0],
        plain[1],
        text.split(text[1:])[0].split(ending)[0],
    ]


def test_generation_ends_with_the_last_ending(tiny, monkeypatch):
    steps = []

    def count(model, prompts, on_token, **options):
        def counted(new):
            steps.append(new)
            return on_token(new)

        return generate_tokens(model, prompts, on_token=counted, **options)

    generate_tokens = generation.generate_tokens
    monkeypatch.setattr(generation, "generate_tokens", count)
    adapter = harness.Adapter(tiny)
    [text] = adapter.generate_until([("The", {"max_gen_toks": 24})])
    assert len(steps) == 24
    steps.clear()
    settings = {"max_gen_toks": 24, "until": text[0]}
    assert adapter.generate_until([("The", settings)]) == [""]
    assert len(steps) == 1


def test_sampling_follows_the_settings(tiny):
    adapter = harness.Adapter(tiny)
    greedy = {"max_gen_toks": 8, "do_sample": False, "temperature": 3.0}
    only = {"max_new_tokens": 8, "do_sample": True, "top_k": 1, "temperature": 3.0}
    drawn = {"max_gen_toks": 8, "temperature": 9.0, "num_beams": 1}
    texts = adapter.generate_until([("The", only), ("The", greedy), ("The", drawn)])
    assert texts[0] == texts[1] != texts[2]


def test_unsupported_settings_raise_an_error(tiny, tokenizer):
    adapter = harness.Adapter(tiny)
    with pytest.raises(ValueError, match=r"{'num_beams': 4} are not supported"):
        adapter.generate_until([("a", {"num_beams": 4})])
    with pytest.raises(ValueError, match="64 new tokens leave no room"):
        adapter.generate_until([("a", {"max_gen_toks": 64})])
    with pytest.raises(ValueError, match="max_length is 65; the model has 64"):
        harness.Adapter(tiny, max_length=65)
    tiny.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        harness.Adapter(tiny)


def test_a_missing_harness_raises_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.api.model", raising=False)
    harness.register.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'kronjax\[eval\]'"):
        harness.register()


@pytest.mark.parity
@pytest.mark.parametrize("count", [1, 6, 7, 8, 23])
def test_windows_equal_those_of_the_harness(count):
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(1, count + 1))
    theirs = utils.get_rolling_token_windows(tokens, 0, 7, 1)
    theirs = [utils.make_disjoint_window(pair) for pair in theirs]
    assert list(harness.windows(tokens, 0, most=7)) == theirs


TASKS = {
    "last_words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{word}}",
        "metric_list": [{"metric": "acc"}],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": 0,
        "doc_to_choice": "{{[word, 'fox', 'lazy dog']}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "whole_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text * 9}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "continued": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 10, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder):
    rows = [
        {"text": "She sells sea", "word": "shells"},
        {"text": "A journey of a thousand", "word": "miles"},
        {"text": "The quick brown ", "word": "fox"},
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in TASKS.items():
        shared = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }  # JSON is YAML
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(shared | task), encoding="utf-8")


def numbers_in(value):
    """Yield all numbers in nested lists, which the harness writes as text."""
    if isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
    else:
        yield float({"True": 1, "False": 0}.get(str(value), value))


def run_harness(folder, module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments]
        + ["--tasks", ",".join(TASKS), "--include_path", str(folder)]
        + ["--output_path", str(folder / module), "--log_samples"],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "cache"),
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [path] = (folder / module).rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    samples = {}
    for name in TASKS:
        [path] = (folder / module).rglob(f"samples_{name}_*.jsonl")
        lines = path.read_text(encoding="utf-8").splitlines()
        samples[name] = [json.loads(line)["resps"] for line in lines]
    return results, samples


@pytest.mark.parity
@pytest.mark.slow
def test_the_harness_gives_the_results_of_the_export_in_torch(tiny, tmp_path):
    for name in ("lm_eval", "torch", "transformers", "accelerate"):
        pytest.importorskip(name)
    write_tasks(tmp_path)
    lm.save(tiny, tmp_path / "ours")
    lm.export(tiny, tmp_path / "dense")
    ours, texts = run_harness(
        tmp_path,
        "kronjax.lm.evaluation.harness",
        "--model_args",
        f"pretrained={tmp_path / 'ours'}",
    )
    theirs, expected = run_harness(
        tmp_path,
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tmp_path / 'dense'},dtype=float32",
        "--device",
        "cpu",
    )
    assert set(ours) == set(theirs) == set(TASKS)
    for name in TASKS:
        figures = [
            {key: x for key, x in results[name].items() if isinstance(x, float)}
            for results in (ours, theirs)
        ]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-6)
        assert figures[0]
    assert len(texts["continued"]) == 3
    assert texts["continued"] == expected["continued"]
    for name in ("last_words", "choices", "whole_texts"):
        ours, theirs = (list(numbers_in(x[name])) for x in (texts, expected))
        assert len(ours) == len(theirs) >= 3
        assert ours == pytest.approx(theirs, rel=1e-4)
