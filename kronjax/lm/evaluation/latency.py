"""Latency of a model, compared with the same model with dense layers.

Fewer operations do not always take less time: with small factors, a processor may wait
for memory or for the next instruction where a large product would keep it busy. So the
model is timed as it is and with every layer multiplied out, in turns.

>>> reading, writing = Times((0.5,), (1.0,)), Times((3.0,), (2.0,))
>>> print(verdict(Latency(1, 64, 32, reading, writing, (), 1, 0.0, "float32", "cpu")))
Reading the prompt, the model is 2.00 times as fast as dense (128.0 against 64.0
tokens/s). Writing, dense is 1.50 times as fast (10.7 against 16.0 tokens/s).
"""

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax import __version__, nn
from kronjax.io.progress import bar
from kronjax.lm.evaluation.turns import Times, take_turns
from kronjax.lm.models.base import LanguageModel, parameter_dtype
from kronjax.lm.models.sizes import kind

if TYPE_CHECKING:
    from rich.table import Table

_SAMPLE = 2e-3
"""Least duration of a sample of a single layer in seconds, for the resolution of the
clock."""


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """Times of the layers of one shape and kind.

    Attributes:
        names: Names of the layers, from `kronjax.nn.surgery.linear_layers`.
        kind: Kind of the layers, from `kronjax.lm.models.sizes.kind`.
        shape: Shape of the layers, `(n_in, n_out)`.
        prefill: Times of one layer for all tokens of the prompts.
        decode: Times of one layer for one token of each row.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, int]
    prefill: Times
    decode: Times


@dataclasses.dataclass(frozen=True)
class Latency:
    """Result of `measure_latency`.

    Attributes:
        batch: Number of rows at a time.
        context: Number of tokens in each prompt.
        new_tokens: Number of tokens written after the prompt, one at a time.
        prefill: Times for reading the prompts.
        decode: Times for writing all new tokens.
        layers: Times of single layers, including the calls from the host.
        factored: Number of layers that are not dense.
        compile_seconds: Time for tracing and compiling both models.
        dtype: The dtype of the parameters.
        device: Name of the processor.
    """

    batch: int
    context: int
    new_tokens: int
    prefill: Times
    decode: Times
    layers: tuple[LayerTimes, ...] = dataclasses.field(repr=False)
    factored: int
    compile_seconds: float
    dtype: str
    device: str

    @property
    def prefill_rate(self) -> float:
        """Number of prompt tokens per second that the model reads."""
        return self.batch * self.context / self.prefill.seconds

    @property
    def decode_rate(self) -> float:
        """Number of tokens per second that the model writes."""
        return self.batch * self.new_tokens / self.decode.seconds

    @property
    def dense_prefill_rate(self) -> float:
        """Number of prompt tokens per second that are read with dense layers."""
        return self.batch * self.context / self.prefill.dense_seconds

    @property
    def dense_decode_rate(self) -> float:
        """Number of tokens per second that are written with dense layers."""
        return self.batch * self.new_tokens / self.decode.dense_seconds


def measure_latency(
    model: LanguageModel,
    *,
    batch: int = 1,
    context: int | None = None,
    new_tokens: int = 32,
    repeats: int = 7,
    progress: bool | None = None,
) -> Latency:
    """Time a model against itself with every factored and masked layer multiplied out.

    Args:
        model: Any language model.
        batch: Number of rows at a time.
        context: Number of tokens in each prompt; by default 512, or as many as the
            model allows.
        new_tokens: Number of tokens to write after the prompt, with a key-value cache.
        repeats: Number of turns; each runs both models, in alternating order.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Returns:
        The times. Both models are in memory meanwhile; they share the dense layers.

    Raises:
        ValueError: If a number is not positive, or the tokens exceed the context of
            the model.
    """
    most = model.config.context
    if new_tokens >= most:
        raise ValueError(
            f"{new_tokens} new tokens leave no room for a prompt: the model has "
            f"{most} positions; take fewer new tokens"
        )
    context = min(512, most - new_tokens) if context is None else context
    sizes = {"batch": batch, "context": context, "new_tokens": new_tokens}
    for name, value in {**sizes, "repeats": repeats}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be positive")
    if context + new_tokens > most:
        raise ValueError(
            f"{context} tokens of context and {new_tokens} new ones exceed the {most} "
            "positions of the model"
        )
    other = nn.multiplied_out(model)
    kinds = nn.linear_layers(model).values()
    factored = sum(not nn.is_dense(layer) for layer in kinds)
    groups = _groups(model)
    begun = time.perf_counter()
    runs = [_Run(model, **sizes)]
    runs += [_Run(other, **sizes)] if factored else []
    # A prompt needs the logits of its last token only.
    layers = [
        _layer_calls(layer, batch, 1 if names == [model.HEAD] else context)
        for layer, names in groups
    ]
    compile_seconds = time.perf_counter() - begun
    steps = 2 + 2 * len(layers)
    with bar(steps, "timing", unit="timings", wanted=progress) as advance:

        def turns(calls, **least):
            times = take_turns(calls, repeats, **least)
            advance(1)
            return times

        prefill = turns([run.prefill for run in runs])
        decode = turns([run.decode for run in runs])
        timed = tuple(
            LayerTimes(
                tuple(group),
                kind(layer),
                (layer.in_features, layer.out_features),
                *(turns(calls, least=_SAMPLE) for calls in both),
            )
            for (layer, group), both in zip(groups, layers, strict=True)
        )
    return Latency(
        **sizes,
        prefill=prefill,
        decode=decode,
        layers=timed,
        factored=factored,
        compile_seconds=compile_seconds,
        dtype=str(parameter_dtype(model)),
        device=jax.devices()[0].device_kind,
    )


def verdict(latency: Latency) -> str:
    """Return one or two sentences that say whether the model or dense is faster."""
    if not latency.factored:
        return "All layers are dense: there is nothing to compare with."
    rates = {
        "reading the prompt": (
            latency.prefill,
            latency.prefill_rate,
            latency.dense_prefill_rate,
        ),
        "writing": (latency.decode, latency.decode_rate, latency.dense_decode_rate),
    }
    sentences = []
    for what, (times, ours, dense) in rates.items():
        rate = f"{ours:,.1f} against {dense:,.1f} tokens/s"
        if times.winner is None:
            sentence = f"{what}, neither is faster beyond the noise ({rate})"
        elif times.winner == "dense":
            sentence = f"{what}, dense is {times.ratio:.2f} times as fast ({rate})"
        else:
            ratio = 1 / times.ratio
            sentence = (
                f"{what}, the model is {ratio:.2f} times as fast as dense ({rate})"
            )
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return " ".join(sentences)


def table(latency: Latency) -> "Table":
    """Return a table of milliseconds for the whole model and for each kind of layer."""
    from rich.table import Table

    shown = Table(
        caption=f"batch {latency.batch}, {latency.context} tokens read at once, "
        f"{latency.new_tokens} written one by one; {latency.dtype} on "
        f"{latency.device}; medians of {len(latency.prefill.samples)} turns, "
        f"{latency.compile_seconds:.1f} s to compile",
        caption_justify="left",
    )
    shown.add_column("layers", no_wrap=True)
    shown.add_column("kind")
    for name in ("read ms", "dense ms", "ratio", "write ms", "dense ms", "ratio"):
        shown.add_column(name, justify="right")
    per_token = latency.new_tokens
    whole = [*_cells(latency.prefill), *_cells(latency.decode, per_token)]
    shown.add_row("whole model", "", *whole, end_section=True)
    for times in latency.layers:
        n_in, n_out = times.shape
        shown.add_row(
            f"{len(times.names)} of {n_in}x{n_out}",
            times.kind,
            *_cells(times.prefill),
            *_cells(times.decode),
        )
    return shown


def summary(latency: Latency) -> dict[str, Any]:
    """Return a result as values for JSON, with all times in seconds."""
    fields = {
        field.name: getattr(latency, field.name)
        for field in dataclasses.fields(latency)
        if field.name not in ("layers", "prefill", "decode")
    }
    return {
        **fields,
        "prefill": _plain(latency.prefill),
        "decode": _plain(latency.decode),
        "prefill_tokens_per_second": latency.prefill_rate,
        "dense_prefill_tokens_per_second": latency.dense_prefill_rate,
        "decode_tokens_per_second": latency.decode_rate,
        "dense_decode_tokens_per_second": latency.dense_decode_rate,
        "layers": [
            {
                "names": list(times.names),
                "kind": times.kind,
                "shape": list(times.shape),
                "prefill": _plain(times.prefill),
                "decode": _plain(times.decode),
            }
            for times in latency.layers
        ],
        "verdict": verdict(latency),
        "kronjax": __version__,
        "jax": jax.__version__,
    }


class _Run:
    """The two compiled programs of a model, for reading and for writing."""

    def __init__(self, model, batch, context, new_tokens):
        graphdef, state = nnx.split(model)
        self.state = jax.tree.map(jnp.asarray, state)
        self.new_tokens = new_tokens
        numbers = np.random.default_rng(0).integers(
            0, model.config.vocab_size, (batch, context), np.int32
        )
        self.tokens = jnp.asarray(numbers)

        def read(state, tokens):
            model = nnx.merge(graphdef, state)
            logits, cache = model.prefill(tokens, context + new_tokens)
            return jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32), cache

        def write(state, token, cache):
            logits, cache = nnx.merge(graphdef, state).step(token, cache)
            return jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32), cache

        shapes = jax.eval_shape(read, self.state, self.tokens)
        self.read = jax.jit(read).lower(self.state, self.tokens).compile()
        lowered = jax.jit(write, donate_argnums=2).lower(self.state, *shapes)
        self.write = lowered.compile()

    def prefill(self):
        """Return the seconds for reading the prompts, and keep the cache."""
        begun = time.perf_counter()
        self.started = jax.block_until_ready(self.read(self.state, self.tokens))
        return time.perf_counter() - begun

    def decode(self):
        """Return the seconds for writing all new tokens."""
        token, cache = jax.tree.map(jnp.copy, self.started)
        jax.block_until_ready(cache)
        begun = time.perf_counter()
        for _ in range(self.new_tokens):
            token, cache = self.write(self.state, token, cache)
        jax.block_until_ready(token)
        return time.perf_counter() - begun


def _groups(model) -> list[tuple[nn.Layer, list[str]]]:
    """Return one layer of each shape and kind, and the names of all such layers."""
    groups: dict[Any, tuple[nn.Layer, list[str]]] = {}
    for name, layer in nn.linear_layers(model).items():
        shapes = tuple(x.shape for x in jax.tree.leaves(nnx.state(layer)))
        key = kind(layer), layer.in_features, layer.out_features, shapes
        groups.setdefault(key, (layer, []))[1].append(name)
    return list(groups.values())


def _layer_calls(layer: nn.Layer, batch: int, context: int):
    """Return the calls of a layer and its dense twin, for prefill and for decoding."""
    twins = [layer] if nn.is_dense(layer) else [layer, nn.dense(layer)]
    dtype = jax.tree.leaves(nnx.state(layer, nnx.Param))[0].dtype
    return [
        [
            _call(twin, jnp.ones((batch, rows, layer.in_features), dtype))
            for twin in twins
        ]
        for rows in (context, 1)
    ]


def _call(layer, x) -> Callable[[int], float]:
    graphdef, state = nnx.split(layer)
    program = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    compiled = program.lower(state, x).compile()

    def run(calls: int = 1) -> float:
        begun = time.perf_counter()
        for _ in range(calls):
            y = compiled(state, x)
        jax.block_until_ready(y)
        return (time.perf_counter() - begun) / calls

    return run


def _cells(times: Times, parts: int = 1) -> list[str]:
    ratio = "" if times.samples == times.dense_samples else f"{times.ratio:.2f}"
    ours, dense = times.seconds, times.dense_seconds
    return [f"{1e3 * x / parts:.3f}" for x in (ours, dense)] + [ratio]


def _plain(times: Times) -> dict[str, Any]:
    return {
        "seconds": times.seconds,
        "dense_seconds": times.dense_seconds,
        "ratio": times.ratio,
        "winner": times.winner,
    }
