import jax
import numpy as np
import pytest
from flax import nnx
from helpers import as_users_run_it

from kronjax import demo
from kronjax.demo import build, corpus
from kronjax.lm.evaluation import perplexity
from kronjax.lm.models import gpt2, initialize, likelihood


@pytest.fixture(autouse=True)
def settings():
    with as_users_run_it():
        yield


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Replace the standard library by a few short files."""
    files = {
        "statistics.py": '"""Means."""\n# A comment of the length that counts here.\n',
        "heapq/__init__.py": '"""Heaps."""\n',
        "heapq/inner.py": '"""More on heaps."""\n',
        "email/message.py": '"""Messages.\n    \n    Indented."""\ndef f(): "Sent."\n',
        "abc.py": "#!/usr/bin/python of a length that comments have to have\nx = 1\n",
        "broken.py": '"""Not closed',
        "null.py": '"""\0"""',
        "latin.py": b'"""Gr\xfc\xdfe."""',
        "test/test_abc.py": '"""A test."""\n',
        "site-packages/other.py": '"""Not of the library."""\n',
        "pydoc_data/topics.py": 'topics = {"if": "The if statement\\n"}\n',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_modules_are_read_in_order_and_those_held_out_apart(library):
    assert list(corpus.documents()) == [
        "Messages.\n\nIndented.\n\n\nSent.",
        "The if statement",
    ]
    assert corpus.training() == "\n\n\n".join(corpus.documents()) + "\n"
    assert corpus.held_out() == (
        "Heaps.\n\n\nMore on heaps.\n\n\n"
        "Means.\n\n\nA comment of the length that counts here.\n"
    )


def test_without_sources_the_error_says_so(library):
    (library / "statistics.py").unlink()
    for read in (corpus.training, corpus.held_out):
        with pytest.raises(FileNotFoundError, match="no sources of its standard"):
            read()


def test_a_comment_inside_a_docstring_is_no_comment():
    example = "# nothing but an example of some length here"
    source = f'def f():\n    """Long:\n\n    {example}\n    """'
    assert list(corpus.passages(source)) == [f"Long:\n\n{example}"]


def test_the_two_parts_of_the_library_are_disjoint():
    held_out, training = demo.held_out(), corpus.training()
    assert held_out == corpus.held_out()
    assert 0.03 < len(held_out) / (len(held_out) + len(training)) < 0.08
    long = {passage for passage in held_out.split("\n\n\n") if len(passage) > 300}
    assert len(long) > 50
    assert not long & set(training.split("\n\n\n"))


def test_the_model_predicts_what_it_has_not_seen():
    model = demo.model()
    assert model.tokenizer is not None
    assert model.tokenizer.size == model.config.vocab_size
    tokens = model.tokenizer.encode(demo.held_out())
    # No model of single tokens does better than the frequencies in the text itself.
    counts = np.unique(tokens, return_counts=True)[1]
    shares = counts / len(tokens)
    unigram = np.exp(-np.sum(shares * np.log(shares)))
    context = model.config.context
    windows = tokens[: len(tokens) // context * context].reshape(-1, context)
    part = windows[::16].ravel()
    found = perplexity.perplexity(model, part, "krony-pt", progress=False).perplexity
    assert found < BOUND
    assert found < unigram / 4


def test_the_folder_is_small_enough_for_a_wheel():
    assert sum(path.stat().st_size for path in demo.MODEL.iterdir()) < 8e6
    assert {path.name for path in demo.MODEL.iterdir()} >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


# Measured: 92, 83 and 79 with the text of Python 3.11, 3.12 and 3.13.
BOUND = 120

TINY = gpt2.Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
TOKENS = np.tile(np.arange(48, dtype=np.int32), 8)


@nnx.jit
def loss(model):
    windows = TOKENS[: 4 * 16].reshape(4, 16)
    return likelihood.token_losses(model, windows).mean()


def test_a_step_of_training_lowers_the_loss():
    model = initialize.draw(TINY, seed=0)
    before = loss(model)
    assert float(before) == pytest.approx(np.log(64), rel=0.05)
    trained = build.train(model, TOKENS, build.Plan(steps=1, batch=4))
    assert loss(trained) < before - 0.01
    assert loss(model) == before


def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    plan, model = build.Plan(steps=4, warmup=1, batch=2), initialize.draw(TINY, seed=0)
    whole = build.train(model, TOKENS, plan)
    kept, windows = tmp_path / "model.training", build._windows

    def interrupted(tokens, context, plan, step):
        if step == 3:
            raise KeyboardInterrupt
        return windows(tokens, context, plan, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "_windows", interrupted)
        build.train(model, TOKENS, plan, kept=kept, every=2)
    capsys.readouterr()
    rest = build.train(model, TOKENS, plan, kept=kept, every=2)
    assert "resuming from step 2" in capsys.readouterr().out
    same = jax.tree.map(np.array_equal, *(nnx.state(x) for x in (whole, rest)))
    assert all(jax.tree.leaves(same))
    mark = build._fingerprint([], TOKENS, plan)
    assert build._resume(kept, mark, "nothing") == (0, "nothing")
    assert "another training" in capsys.readouterr().out
