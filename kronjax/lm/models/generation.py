"""Greedy or sampled generation, one token at a time, with a key-value cache.

The prompts of a batch are padded on the left to a common length. Two programs are
compiled: one for the prompts, one for every later token. A conversation has a `Session`
that keeps its cache. A token is drawn from

    softmax(logits / temperature)

restricted to the `top_k` most likely tokens and, among those, to the most likely ones
that together reach the probability `top_p`. At temperature 0 it is the most likely one.

References: Holtzman et al. (2020) for top_p.

>>> bucket(5), bucket(33)
(32, 64)
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax.lm.models.base import LanguageModel, check_vocabulary, tokenizer_of
from kronjax.lm.models.session import Session
from kronjax.lm.text.special_tokens import GENERATION, end_numbers, read
from kronjax.lm.text.tokenizer import Tokenizer

STEP = 32
"""Lengths are rounded up to a multiple of this number, so that few programs are
compiled."""


Chat = Sequence[Mapping[str, Any]]
"""A conversation: messages, each with its `role` and `content`."""


@overload
def generate(model: LanguageModel, prompt: str | Chat, **options) -> str: ...
@overload
def generate(
    model: LanguageModel, prompt: Sequence[str] | Sequence[Chat], **options
) -> list[str]: ...
def generate(model, prompt, **options):
    """Continue a prompt, or several in one batch.

    Args:
        model: A model with a tokenizer.
        prompt: A text; or a conversation, `[{"role": "user", "content": "Hi"}]`, which
            is put into the format of the model and continued by a reply; or several
            texts or conversations.
        **options: The options of `generate_tokens`.

    Returns:
        The continuation without the prompt, or the reply; or a list of them.

    Raises:
        ValueError: If the model has no tokenizer, the tokenizer does not belong to the
            model, it has no chat template for a conversation, or `generate_tokens`
            raises it.
    """
    tokenizer = tokenizer_of(model)
    single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping))
    prompts = [prompt] if single else list(prompt)
    rows = [
        tokenizer.encode(x) if isinstance(x, str) else chat_tokens(tokenizer, x)
        for x in prompts
    ]
    chat = not all(isinstance(x, str) for x in prompts)
    if "stop" not in options:
        options["stop"] = stop_tokens(model, tokenizer, chat=chat)
    new = generate_tokens(model, rows, **options)
    texts = [
        tokenizer.decode(after) if chat else continuation(tokenizer, before, after)
        for before, after in zip(rows, new, strict=True)
    ]
    return texts[0] if single else texts


def apply_chat_template(
    model: LanguageModel, messages: Chat, **options
) -> np.ndarray | str:
    """Return a conversation in the format of a model.

    Args:
        model: A model whose tokenizer has a chat template.
        messages: The messages, each with a `role` (`"system"`, `"user"` or
            `"assistant"`) and its `content`.
        **options: The options of `Tokenizer.apply_chat_template`, such as
            `add_generation_prompt=True` and `tokenize=False`.

    Returns:
        Tokens, `[n]`, int32, or the text.

    Raises:
        ValueError: If there is no template, or it cannot be rendered; the message
            names the file.
    """
    return tokenizer_of(model).apply_chat_template(messages, **options)


def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    on_token: Callable[[list[int]], bool | None] | None = None,
    session: Session | None = None,
) -> list[list[int]]:
    """Continue prompts that are given as tokens.

    Args:
        model: Any language model.
        prompts: Tokens of `b` prompts, none of them empty.
        max_new_tokens: Largest number of tokens to add.
        temperature: Temperature of the softmax; 0 takes the most likely token.
        top_k: Number of tokens to draw from; None for all.
        top_p: Total probability of the tokens to draw from.
        seed: Seed of the draws.
        stop: Tokens that end a row; they are not returned.
        on_token: A function called after every step with the new token of each row. If
            it returns True, generation ends.
        session: The cache of a conversation, whose turns are read once; for one prompt.

    Returns:
        The new tokens of every row.

    Raises:
        ValueError: If a prompt is empty, a token or a setting is out of range, or the
            longest prompt and its new tokens exceed the model's context.
    """
    longest = _checked(model, prompts, max_new_tokens, temperature, top_k, top_p)
    graph, state = nnx.split(model)
    start, step, append = _programs(graph, temperature > 0)
    k = (
        model.config.vocab_size
        if top_k is None
        else min(top_k, model.config.vocab_size)
    )
    draw = (jnp.float32(temperature or 1.0), jnp.int32(k), jnp.float32(top_p))
    keys = jax.random.split(jax.random.key(seed % 2**32), max_new_tokens)
    if session is None:
        width = min(bucket(longest), model.config.context - max_new_tokens)
        slots = width + bucket(max_new_tokens)
        new, cache = start(state, *_aligned(prompts, width), slots, keys[0], draw)
    else:
        (prompt,) = prompts
        call = functools.partial(append, state, keys[0], draw)
        new, cache = session.begin(model, prompt, max_new_tokens, call)
    rows: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(rows)
    first: list[int] = []  # the tokens of the first row
    for i in range(max_new_tokens):
        if i:
            new, cache = step(state, new, cache, keys[i], draw)
        drawn = np.asarray(new)[:, 0].tolist()
        if min(drawn) < 0:
            raise ValueError(
                "the model returns NaN: its weights are damaged, or too large for "
                "their dtype; try float32"
            )
        first.append(drawn[0])
        for row, token in enumerate(drawn):
            done[row] = done[row] or token in stop
            if not done[row]:
                rows[row].append(token)
        stopped = on_token is not None and on_token(drawn)
        if stopped or all(done):
            break
    if session is not None:
        session.keep(cache, first[:-1])  # the last one was not read
    return rows


def chat_tokens(tokenizer: Tokenizer, messages: Chat) -> np.ndarray:
    """Return the tokens of a conversation and of the beginning of a reply."""
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return np.asarray(tokens, np.int32)


def stop_tokens(
    model: LanguageModel, tokenizer: Tokenizer, *, chat: bool = False
) -> tuple[int, ...]:
    """Return the tokens that end a text.

    Those are `eos_token_id` of `generation_config.json` or, without it, that of
    `config.json`, as in transformers, and the tokenizer's own end-of-text token.

    Args:
        model: Any language model.
        tokenizer: Its tokenizer.
        chat: Whether to add the token that the chat template puts after a reply.

    Raises:
        ValueError: If one of them is not a number, or not in the vocabulary of the
            model; the message names the file and the key.
    """
    file = GENERATION
    numbers = end_numbers(read(tokenizer.files, file), file)
    if not numbers:
        file = "config.json"
        numbers = end_numbers(json.loads(model.config.origin), file)
    for number in numbers:
        if number >= model.config.vocab_size:
            raise ValueError(
                f"{file}: eos_token_id is {number}, but the model has "
                f"{model.config.vocab_size} tokens; correct or remove it"
            )
    ends = [*numbers, *tokenizer.stops, tokenizer.eos]
    if chat:
        ends.append(tokenizer.turn_end)
    return tuple(dict.fromkeys(token for token in ends if token is not None))


def continuation(
    tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray, new: Sequence[int]
) -> str:
    """Return the text of new tokens, including a space that may begin it.

    Tokenizers made by SentencePiece drop a space at the beginning of a text, so the new
    tokens are decoded together with the prompt.
    """
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode([*prompt, *new])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)


def bucket(length: int) -> int:
    """Return `length` rounded up to a multiple of `STEP`."""
    return -(-length // STEP) * STEP


@functools.lru_cache(maxsize=16)
def _programs(graph, sampled):
    """Return the compiled first call, step and chunk of a prompt of an architecture."""

    def draw_from(logits, key, draw):
        logits = logits.astype(jnp.float32)
        new = _sample(logits, key, *draw) if sampled else jnp.argmax(logits, axis=-1)
        new = jnp.where(jnp.isnan(logits).any(axis=-1), -1, new)
        return new.astype(jnp.int32)[:, None]

    def start(state, tokens, mask, slots, key, draw):
        model = nnx.merge(graph, state)
        logits, cache = model.prefill(tokens, slots, mask=mask)
        return draw_from(logits, key, draw), cache

    def step(state, tokens, cache, key, draw):
        logits, cache = nnx.merge(graph, state).step(tokens, cache)
        return draw_from(logits, key, draw), cache

    def append(state, key, draw, tokens, mask, cache):
        logits, cache = nnx.merge(graph, state).step(tokens, cache, mask=mask)
        return draw_from(logits, key, draw), cache

    return (
        jax.jit(start, static_argnums=3),
        jax.jit(step, donate_argnums=2),
        jax.jit(append, donate_argnums=5),
    )


def _aligned(prompts, width):
    """Return prompts padded on the left, `[b, width]`, and their mask."""
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return tokens, mask


def _sample(logits, key, temperature, top_k, top_p):
    """Draw a token for each row of `logits`, `[b, vocab_size]`."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
    ranks = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    ranked = jnp.where(ranks < top_k, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    # The most likely token is kept whatever top_p is.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where((before < top_p) | (ranks == 0), ranked, -jnp.inf)
    drawn = jax.random.categorical(key, ranked, axis=-1)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]


def _checked(model, prompts, max_new_tokens, temperature, top_k, top_p):
    """Check prompts and settings, and return the length of the longest prompt."""
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt without tokens cannot be continued")
    settings = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < np.inf, "0 or positive"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
    )
    for name, value, is_valid, expected in settings:
        if not is_valid:
            raise ValueError(f"{name} is {value}; it must be {expected}")
    for prompt in prompts:
        check_vocabulary(model, np.asarray(prompt), model.tokenizer)
    longest, context = max(len(prompt) for prompt in prompts), model.config.context
    if longest >= context:
        raise ValueError(
            f"a prompt of {longest} tokens leaves none of the model's {context} "
            "positions free; shorten it"
        )
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new tokens exceed the "
            f"{context} positions of the model; take fewer new tokens"
        )
    return longest
