"""Second moments of the inputs of layers and of the gradients at their outputs.

    C = mean over tokens of x xᵀ        x the input of a layer, [n_in, n_in]
    L = mean over tokens of g gᵀ        g the gradient at its output, [n_out, n_out]

Here `g` is the gradient of the sum of the losses of all tokens. For an error `E` of a
kernel, `½ ‖L^{1/2} E C^{1/2}‖_F²` is the increase of the loss per token in Fisher's
approximation. Layers that read the same array share its moments. The head is left out.

The moments are summed over batches in one pass, in float32 on the device. No array of
the size of a batch times a layer is stored: `g gᵀ` is formed where the backward pass
computes `g`.

References: Martens and Grosse (2015) for the factored Fisher matrix.

>>> moments = Moments({"fc": "fc"}, {"fc": np.eye(2)}, {}, 10, "")
>>> moments.input("fc").tolist()
[[1.0, 0.0], [0.0, 1.0]]
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from kronjax import nn
from kronjax.io import atomic, matrices
from kronjax.io.progress import bar
from kronjax.lm.models import attention, likelihood
from kronjax.lm.models.base import LanguageModel, check_vocabulary, inner_layers
from kronjax.lm.models.finite import cause

SHRINKAGE = 0.1
"""Default shrinkage. SmolLM2-135M, calibrated on 32,768 tokens of books and compressed
to 0.8 of its linear layers with low rank alone, loses 0.375 nats per token on
WikiText-2 without shrinkage, 0.340 with 0.01, 0.299 with 0.1 and 0.321 with 0.3."""

FOREIGN = 0.7
"""Fraction of the entropy of the vocabulary above which a text counts as foreign."""

FORMAT = "kronjax-moments"
"""Value of the metadata entry `format` in the files of `save_moments`."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of the layers of a model over some text.

    Attributes:
        sources: Name of the first layer with the same input, by layer.
        inputs: `[n_in, n_in]`, float32, for each of these sources.
        outputs: `[n_out, n_out]`, float32, for each layer; empty without gradients.
        tokens: Number of tokens seen.
        tokens_sha256: SHA-256 of the tokens as little-endian int32.
        nll: Loss of the model on them in nats per token; None without gradients.
        shrinkage: Share by which `input` and `output` move every moment to the multiple
            of the identity of the same trace, because a short text says little about
            rare directions (Ledoit and Wolf, 2004).
    """

    sources: Mapping[str, str]
    inputs: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    outputs: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    tokens: int
    tokens_sha256: str
    nll: float | None = None
    shrinkage: float = SHRINKAGE

    def input(self, name: str) -> np.ndarray:
        """Return the shrunk moment of the input of a layer, `[n_in, n_in]`."""
        return self._shrunk(self.inputs[self.sources[name]])

    def output(self, name: str) -> np.ndarray:
        """Return the shrunk moment of the gradient at its output, `[n_out, n_out]`."""
        return self._shrunk(self.outputs[name])

    def _shrunk(self, moment):
        mean = np.trace(moment, dtype=np.float64) / len(moment)
        identity = np.eye(len(moment), dtype=moment.dtype)
        share = moment.dtype.type(self.shrinkage)
        return (1 - share) * moment + moment.dtype.type(mean) * share * identity


def measure_moments(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    gradients: bool = False,
    context: int = 1024,
    batch: int | None = None,
    limit: int | None = None,
    progress: bool | None = None,
) -> Moments:
    """Measure the moments of every linear layer of a model.

    The cost is one forward pass, and `n_in²` multiply-adds per token for each input;
    `memory` gives the memory.

    Args:
        model: A model of any architecture; not modified.
        tokens: `[n]`, integers; split into windows of `context`, without the rest.
        gradients: Whether to measure gradients, too, which costs a backward pass.
        context: Length of a window, at most the context of the model.
        batch: Number of windows at a time; by default enough to keep the device busy.
        limit: Largest number of bytes of moments on the device at a time. If all
            moments take more, the text is read several times, for a part of the layers
            each. By default half of the memory of the device, if known.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Returns:
        `Moments`.

    Raises:
        ValueError: If the text is shorter than 257 tokens, a token is not in the
            vocabulary, or a moment is not finite.
    """
    tokens = np.asarray(tokens)
    if len(tokens) < 257:
        raise ValueError(
            f"calibration needs 257 tokens or more, the text has {len(tokens)}; about "
            "ten thousand are enough"
        )
    check_vocabulary(model, tokens, model.tokenizer)
    context = min(context, model.config.context, len(tokens) - 1)
    count = (len(tokens) - 1) // context
    rows = [tokens[i * context : (i + 1) * context + 1] for i in range(count)]
    windows = np.stack(rows).astype(np.int32)
    # A backward pass stores activations for every token.
    busy = 1024 if gradients else 2048
    batch = min(batch or max(busy // context, 1), count)
    graph, state = nnx.split(model)
    sources = _sources(model, windows[:batch])
    parts = _parts(model, sources, gradients, limit or _device_limit())
    seen = count * context
    inputs, outputs, nll = {}, {}, 0.0
    with bar(seen * len(parts), "calibrating", wanted=progress) as advance:
        for held in parts:
            program = _program(graph, tuple(sorted(held.items())), gradients)
            sums = *_zeros(model, held, gradients), jnp.zeros((), jnp.float32)
            for first in range(0, count, batch):
                part = windows[first : first + batch]
                weight = np.zeros(batch, np.float32)
                weight[: len(part)] = 1  # the last batch is padded, with weight 0
                filled = np.concatenate([part, windows[: batch - len(part)]])
                sums = jax.block_until_ready(program(state, filled, weight, sums))
                advance(part.size - len(part))
            means = jax.tree.map(lambda x: np.asarray(x) / np.float32(seen), sums)
            inputs, outputs = inputs | means[0], outputs | means[1]
            nll = float(means[2])
    bad = [
        name
        for name in _calls(model, windows[:1])  # the first one infects the others
        for moment in (inputs.get(name), outputs.get(name))
        if moment is not None and not np.isfinite(moment).all()
    ]
    if bad:
        why = cause(model, f"the moments of {bad[0]} are not finite")
        raise ValueError(f"the model cannot be calibrated: {why}")
    digest = hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()
    loss = nll if gradients else None
    return Moments(sources, inputs, outputs, seen, digest, loss)


def is_foreign(model: LanguageModel, moments: Moments) -> bool:
    """Return whether the loss on the calibration text is close to that of chance.

    That means above `FOREIGN` times the entropy of the vocabulary.
    """
    chance = math.log(model.config.vocab_size)
    return moments.nll is not None and moments.nll > FOREIGN * chance


def memory(model: LanguageModel, *, gradients: bool = False) -> int:
    """Return the number of bytes of the moments of a model.

    Args:
        model: The model, whose arrays may be abstract.
        gradients: Whether to count the moments of gradients, too.
    """
    sources = _sources(model, np.zeros((1, 2), np.int32))
    sums = jax.eval_shape(lambda: _zeros(model, sources, gradients))
    return sum(int(np.prod(x.shape)) * 4 for x in jax.tree.leaves(sums))


def save_moments(moments: Moments, path: str | Path) -> None:
    """Write moments as safetensors, completely or not at all."""
    tensors, facts = pack(moments)
    metadata = {"format": FORMAT, "facts": json.dumps(facts)}
    atomic.write(Path(path), safetensors.numpy.save(tensors, metadata))


def load_moments(path: str | Path) -> Moments:
    """Read a file of `save_moments`.

    Raises:
        ValueError: If the file is damaged or contains no moments.
        OSError: If the file cannot be read.
    """
    tensors = matrices.map_tensors(Path(path))
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no moments")
    copies = {name: np.array(tensor) for name, tensor in tensors.items()}
    return unpack(copies, json.loads(metadata["facts"]))


def pack(moments: Moments) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return moments as arrays by name, and facts that JSON can hold."""
    tensors = {f"inputs.{name}": x for name, x in moments.inputs.items()}
    tensors |= {f"outputs.{name}": x for name, x in moments.outputs.items()}
    facts = {
        "sources": dict(moments.sources),
        "tokens": moments.tokens,
        "tokens_sha256": moments.tokens_sha256,
        "nll": moments.nll,
    }
    return tensors, facts


def unpack(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Moments:
    """Return the moments of arrays and facts from `pack`."""
    kinds: dict[str, dict[str, np.ndarray]] = {"inputs": {}, "outputs": {}}
    for name, tensor in tensors.items():
        kind, _, layer = name.partition(".")
        kinds[kind][layer] = tensor
    return Moments(**kinds, **facts)


class _Recorder:
    """A layer that passes its input and output to a function during tracing."""

    def __init__(self, layer, see):
        self.layer, self.see = layer, see

    def __call__(self, x):
        return self.see(x, self.layer(x))


def record(model: nnx.Module, see: Callable[[str, Any, Any], Any]) -> None:
    """Replace all layers of a model or of a block by recorders.

    Args:
        model: Changed in place; a temporary model for tracing.
        see: Function of the name of a layer, its input and its output, which returns
            the output to use.
    """
    for name, layer in inner_layers(model).items():
        nn.put(model, name, _Recorder(layer, functools.partial(see, name)))


def _sources(model: LanguageModel, tokens: np.ndarray) -> dict[str, str]:
    """Return for each layer the first layer that reads the same array."""
    sources = _calls(model, tokens)
    return {name: sources[name] for name in inner_layers(model)}


def _calls(model: LanguageModel, tokens: np.ndarray) -> dict[str, str]:
    """Return the first layer that reads the same array, in the order of calls."""
    graph, state = nnx.split(model)
    first: dict[int, str] = {}
    sources: dict[str, str] = {}
    seen = []  # kept alive, so that no two arrays have the same id

    def see(name, x, y):
        seen.append(x)
        sources[name] = first.setdefault(id(x), name)
        return y

    def run(state):
        merged = nnx.merge(graph, state)
        record(merged, see)
        return merged(jnp.asarray(tokens[:, :-1]))

    jax.eval_shape(run, state)
    return sources


def _parts(model, sources, gradients, limit):
    """Return the sources of groups of layers whose moments fit into a limit."""
    layers, parts, used = nn.linear_layers(model), [{}], 0
    for source in dict.fromkeys(sources.values()):
        group = {name: first for name, first in sources.items() if first == source}
        entries = layers[source].in_features ** 2
        entries += sum(layers[n].out_features ** 2 for n in group) * gradients
        used += 4 * entries
        if limit is not None and used > limit and parts[-1]:
            parts.append({})
            used = 4 * entries
        parts[-1] |= group
    return parts


def _device_limit():
    """Return half of the memory of the device, or None if it is unknown."""
    facts = jax.local_devices()[0].memory_stats() or {}
    return facts["bytes_limit"] // 2 if "bytes_limit" in facts else None


def _zeros(model, sources, gradients):
    """Return zeros for the sums of inputs and of gradients."""
    layers = nn.linear_layers(model)

    def zeros(size):
        return jnp.zeros((size, size), jnp.float32)

    inputs = {name: zeros(layers[name].in_features) for name in set(sources.values())}
    outputs = {name: zeros(layers[name].out_features) for name in sources}
    return inputs, outputs if gradients else {}


@functools.lru_cache(maxsize=4)
def _program(graph, sources, gradients):
    """Return the compiled step: state, tokens `[b, t + 1]`, weights `[b]`, sums."""
    owners = set(dict(sources).values())

    def total(probes, state, tokens, weight):
        """Return the sum of all losses and the moments of the inputs."""
        model = nnx.merge(graph, state)
        b, t = tokens.shape
        inputs = {}

        def see(name, x, y):
            if name in owners:
                inputs[name] = gram(x * weight[:, None, None].astype(x.dtype))
            return _probe(y, probes[name]) if name in probes else y

        record(model, see)
        if not gradients:
            model.hidden(tokens[:, :-1], attention.locate((b, t - 1)))
            return jnp.zeros((), jnp.float32), inputs
        nll = likelihood.token_losses(model, tokens)
        return jnp.sum(nll * weight[:, None]).astype(jnp.float32), inputs

    def step(state, tokens, weight, sums):
        given, grams = (state, tokens, weight), {}
        if gradients:
            probes = jax.tree.map(jnp.zeros_like, sums[1])
            run = jax.value_and_grad(total, has_aux=True)
            (nll, seen), grams = run(probes, *given)
        else:
            nll, seen = total({}, *given)
        return jax.tree.map(jnp.add, sums, (seen, grams, nll))

    return jax.jit(step, donate_argnums=3)


def gram(x: jax.Array) -> jax.Array:
    """Return the sum of `x xᵀ` over all but the last axis, float32 `[n, n]`."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.einsum(
        "ti,tj->ij", rows, rows, precision="highest", preferred_element_type=jnp.float32
    )


@jax.custom_vjp
def _probe(y, probe):
    """Return `y`; the gradient of `probe` `[n, n]` is the sum of `g gᵀ`."""
    return y


def _probe_forward(y, probe):
    return y, None


def _probe_backward(_, g):
    return g, gram(g)


_probe.defvjp(_probe_forward, _probe_backward)
