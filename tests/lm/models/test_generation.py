"""Continuations, compared with the model's logits without a cache."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kronjax import lm
from kronjax.lm.models import generation, gpt2
from kronjax.lm.models.generation import generate_tokens
from kronjax.lm.text.tokenizer import Tokenizer

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]


def assert_greedy(model, prompt, new):
    """Check without a cache that every new token is the most likely one."""
    row = np.array([[*prompt, *new]], np.int32)
    best = np.argmax(np.asarray(model(row))[0], axis=-1)
    assert best[len(prompt) - 1 : -1].tolist() == new


def test_greedy_continuations_are_the_same_without_a_cache(tiny):
    rows = generate_tokens(tiny, PROMPTS, max_new_tokens=6)
    for prompt, new in zip(PROMPTS, rows, strict=True):
        assert len(new) == 6
        assert_greedy(tiny, prompt, new)
    # A row ends before its stop token, while the other row continues.
    stop = rows[0][-1]
    assert stop not in rows[1]
    shorter = generate_tokens(tiny, PROMPTS, max_new_tokens=6, stop=(stop,))
    assert shorter == [rows[0][: rows[0].index(stop)], rows[1]]


def test_samples_depend_on_the_seed_and_obey_top_k_and_top_p(tiny):
    options = {"max_new_tokens": 5, "temperature": 2.0}
    first, again, other = (
        generate_tokens(tiny, PROMPTS, seed=seed, **options) for seed in (0, 0, 1)
    )
    assert first == again != other
    greedy = generate_tokens(tiny, PROMPTS, max_new_tokens=5)
    assert generate_tokens(tiny, PROMPTS, top_k=1, **options) == greedy
    assert generate_tokens(tiny, PROMPTS, top_p=1e-6, **options) == greedy


def test_samples_follow_the_distribution():
    """The logits of this model are the same at every position."""
    config = gpt2.Config(vocab_size=4, n_embd=4, n_layer=1, n_head=1, n_positions=600)
    model = gpt2.Model(config, rngs=nnx.Rngs(0))
    model.ln_f.scale[...] = jnp.zeros(4)
    model.ln_f.bias[...] = jnp.ones(4)
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    model.wte.embedding[...] = jnp.zeros((4, 4)).at[:, 0].set(logits)
    prompts = [[0]] * 8
    drawn = np.ravel(
        generate_tokens(model, prompts, max_new_tokens=500, temperature=1.0)
    )
    shares = np.bincount(drawn, minlength=4) / drawn.size
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=0.03)
    drawn = np.ravel(
        generate_tokens(model, prompts, max_new_tokens=500, temperature=1.0, top_p=0.65)
    )
    # The probabilities 0.4 and 0.3 suffice to reach 0.65.
    assert set(drawn.tolist()) == {2, 3}


def test_nan_raises_an_error(tiny):
    tiny.ln_f.scale[...] = jnp.full_like(tiny.ln_f.scale[...], jnp.nan)
    with pytest.raises(ValueError, match="returns NaN"):
        generate_tokens(tiny, PROMPTS, max_new_tokens=6)


def test_top_p_is_applied_to_the_top_k():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.1, 0.1, 0.1, 0.1]]))
    draw = jnp.float32(1.0), jnp.int32(2), jnp.float32(0.5)
    keys = jax.random.split(jax.random.key(0), 50)
    drawn = jax.vmap(lambda key: generation._sample(logits, key, *draw)[0])(keys)
    # Among the two, the first has probability 2/3, which is enough.
    assert set(np.asarray(drawn).tolist()) == {0}


def test_the_space_before_a_continuation_is_kept():
    """Tokenizers made by SentencePiece drop the first space when they decode."""
    words = ["the", " capital", " is", " Paris"]

    class Stripping:
        def decode(self, tokens):
            return "".join(words[i] for i in tokens).removeprefix(" ")

    assert generation.continuation(Stripping(), [0, 1, 2], [3]) == " Paris"


def test_generate_takes_and_returns_texts(tiny):
    text = lm.generate(tiny, "The quick", max_new_tokens=4)
    texts = lm.generate(tiny, ["The quick", "A"], max_new_tokens=4)
    assert isinstance(text, str) and texts[0] == text and len(texts) == 2
    tokens = tiny.tokenizer.encode("The quick")
    (new,) = generate_tokens(tiny, [tokens], max_new_tokens=4)
    assert_greedy(tiny, tokens, new)
    assert text == tiny.tokenizer.decode(new)


def test_generate_replies_to_conversations(tiny):
    source = b"{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tiny.tokenizer = Tokenizer({**tiny.tokenizer.files, "chat_template.jinja": source})
    chat = [{"role": "user", "content": "The quick"}]
    reply = lm.generate(tiny, chat, max_new_tokens=4)
    assert lm.generate(tiny, [chat, chat], max_new_tokens=4) == [reply, reply]
    tokens = lm.apply_chat_template(tiny, chat, add_generation_prompt=True)
    assert tokens[-1] == tiny.tokenizer.eos == tiny.tokenizer.turn_end
    (new,) = generate_tokens(tiny, [tokens], max_new_tokens=4)
    assert reply == tiny.tokenizer.decode(new)
    with pytest.raises(ValueError, match="a conversation is a list of messages"):
        lm.generate(tiny, [[]])


def ends(model, config=None, generated=None, **files):
    """The stop tokens of a model whose files are completed."""
    if config is not None:
        origin = json.dumps({"eos_token_id": config})
        model.config = dataclasses.replace(model.config, origin=origin)
    added = {f"{name}.json": json.dumps(x).encode() for name, x in files.items()}
    if generated is not None:
        values = json.dumps({"eos_token_id": generated})
        added["generation_config.json"] = values.encode()
    tokenizer = Tokenizer({**model.tokenizer.files, **added})
    return generation.stop_tokens(model, tokenizer)


def test_stop_tokens_are_those_of_generation_config_config_and_tokenizer(tiny):
    end = tiny.tokenizer.eos
    assert ends(tiny) == (end,)
    assert ends(tiny, config=7) == (7, end)
    assert ends(tiny, config=[7, end, 9]) == (7, end, 9)
    assert ends(tiny, config=[-1, 7]) == (7, end)  # -1 stands for none
    # That of generation_config.json comes first, as in transformers.
    assert ends(tiny, config=7, generated=[8, 9]) == (8, 9, end)
    settings = {"eos_token": "<|user|>"}
    assert ends(
        tiny, config=7, added_tokens={"<|user|>": 300}, tokenizer_config=settings
    ) == (7, 300)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": 300}, "config.json: eos_token_id is 300, but the model has 300"),
        ({"generated": [1, 900]}, "generation_config.json: eos_token_id is 900, but"),
        ({"config": "</s>"}, "config.json: eos_token_id is '</s>'; it must be"),
    ],
)
def test_stop_tokens_outside_the_vocabulary_raise_an_error(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        ends(tiny, **options)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "without tokens"),
        ([[1], []], {}, "without tokens"),
        ([[300]], {}, "token 300 is not"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[-1]], {}, "token -1 is not"),
        ([[1]], {"max_new_tokens": 64}, "64 positions"),
        ([[1] * 64], {}, "shorten it"),
        ([[1]], {"temperature": -1.0}, "temperature is -1"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0"),
    ],
)
def test_wrong_arguments_raise_an_error(tiny, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        generate_tokens(tiny, prompts, **options)


def test_a_missing_or_wrong_tokenizer_raises_an_error(tiny):
    tokenizer, tiny.tokenizer = tiny.tokenizer, None
    with pytest.raises(ValueError, match="tokenizer.json"):
        lm.generate(tiny, "The")
    small = gpt2.Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, n_positions=64)
    model = gpt2.Model(small, rngs=nnx.Rngs(0))
    model.tokenizer = Tokenizer(tokenizer.files)
    with pytest.raises(ValueError, match="has 50 tokens, the tokenizer 300"):
        lm.generate(model, "The quick brown fox", max_new_tokens=1)
