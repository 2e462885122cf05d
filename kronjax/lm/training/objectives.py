"""The objective of training: next-token loss, and distances to a teacher.

    w_n CE + w_l T² KL(teacher_T ‖ student_T) + w_h Σ_j ‖h_j − h'_j‖² / ‖h'_j‖²
           + w_a Σ_j KL(attention'_j ‖ attention_j)

All terms are means over tokens. The logits of both are divided by the temperature `T`.
Hidden states are those after the embedding and after every block of a map from blocks
of the student to blocks of the teacher; attention is compared head by head in the same
blocks. The teacher is evaluated once, without gradient.

References: Hinton, Vinyals and Dean (2015); for matching states and attention
KroneckerBERT (Tahaei et al., 2021) and KnGPT2 (Edalati et al., 2021).

>>> uniform_map(2, 6)
((0, 2), (1, 5))
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from kronjax.lm.models import attention
from kronjax.lm.models.base import LanguageModel
from kronjax.lm.training.settings import Weights

_LOGITS = 2**26
"""Number of logits computed at a time to save memory."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
    """The intermediate results of one pass through a model.

    Attributes:
        last: `[b, t, width]`, the states before the head.
        states: `[b, t, width]`, the states after the embedding and after each block.
        heads: Queries and keys of each block.
    """

    last: jax.Array
    states: list[jax.Array]
    heads: list[tuple[jax.Array, jax.Array]]


def uniform_map(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Return pairs of a block of the student and the one of the teacher at its end.

    Args:
        student: Number of blocks of the student.
        teacher: Number of blocks of the teacher.
    """
    return tuple((i, max((i + 1) * teacher // student, 1) - 1) for i in range(student))


def check(student: LanguageModel, teacher: LanguageModel, weights: Weights) -> None:
    """Refuse a teacher that cannot be compared with the student.

    Raises:
        ValueError: If the vocabularies differ, or the pairs of blocks do not exist.
    """
    ours, theirs = student.config, teacher.config
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"the teacher has a vocabulary of {theirs.vocab_size} tokens, the student "
            f"one of {ours.vocab_size}: give a teacher with the student's tokenizer"
        )
    if not weights.looks_inside:
        return
    for i, j in weights.layers or uniform_map(ours.num_layers, theirs.num_layers):
        if not (0 <= i < ours.num_layers and 0 <= j < theirs.num_layers):
            raise ValueError(
                f"block {i} of the student is to match block {j} of the teacher; they "
                f"have {ours.num_layers} and {theirs.num_layers} blocks"
            )


def walk(
    model: LanguageModel,
    tokens: jax.Array,
    *,
    remat: bool = False,
    inside: bool = False,
) -> Pass:
    """Run a model on tokens, up to its head.

    Args:
        model: A model of any architecture.
        tokens: `[b, t]`.
        remat: Whether to store only the input of each block, and to recompute the rest
            for the gradient.
        inside: Whether to return states and attention.
    """
    places = attention.locate(tokens.shape)
    x = model.embed(tokens, places)
    states, heads = [x] if inside else [], []
    for block in model.blocks:
        graph, state = nnx.split(block)

        def apply(state, x, graph=graph):
            with attention.recording() as seen:
                y, _ = model.apply_block(nnx.merge(graph, state), x, places)
            return y, seen[0] if inside else None

        x, seen = (jax.checkpoint(apply) if remat else apply)(state, x)
        if inside:
            states.append(x)
            heads.append(seen)
    return Pass(model.finish(x), states, heads)


def objective(
    student: LanguageModel,
    teacher: LanguageModel | None,
    windows: jax.Array,
    weights: Weights,
    *,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted loss, and its terms before weighting.

    Args:
        student: A model of any architecture.
        teacher: A model of the same vocabulary, or None for the next-token loss alone.
        windows: `[b, t + 1]`, tokens.
        weights: Weights of the terms.
        remat: Whether to save memory by computing blocks and logits twice.

    Returns:
        The weighted sum, float32, and the terms that contribute to it, by name:
        `next_token`, `logits`, `hidden` and `attention`.
    """
    tokens, targets = windows[:, :-1], windows[:, 1:]
    inside = teacher is not None and weights.looks_inside
    ours = walk(student, tokens, remat=remat, inside=inside)
    if teacher is None:
        nll = _mean(
            lambda x, y: _nll(student.head(x), y)[None],
            student,
            remat,
            ours.last,
            targets,
        )
        return nll[0], {"next_token": nll[0]}
    theirs = jax.lax.stop_gradient(walk(teacher, tokens, inside=inside))

    def compare(x, z, y):
        logits, wanted = student.head(x), jax.lax.stop_gradient(teacher.head(z))
        softened = _divergence(logits, wanted, weights.temperature)
        return jnp.stack([_nll(logits, y), softened])

    both = _mean(compare, student, remat, ours.last, theirs.last, targets)
    terms = {"next_token": both[0], "logits": both[1]}
    if inside:
        counts = student.config.num_layers, teacher.config.num_layers
        pairs = weights.layers or uniform_map(*counts)
        if weights.hidden:
            terms["hidden"] = _hidden(ours, theirs, pairs)
        if weights.attention:
            terms["attention"] = _attention(ours, theirs, pairs)
    total = sum(getattr(weights, name) * value for name, value in terms.items())
    return jnp.asarray(total), terms


def _mean(
    function: Callable[..., jax.Array],
    student: LanguageModel,
    remat: bool,
    *arrays: jax.Array,
) -> jax.Array:
    """Return the mean over tokens of the values of a function, `[k]`.

    Args:
        function: Function of arrays `[n, ...]` with values `[k, n]`.
        student: Model whose vocabulary determines the number of tokens at a time.
        remat: Whether to compute the logits twice, for some tokens at a time.
        *arrays: `[b, t, ...]`, arguments of the function.
    """
    flat = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    total = len(flat[0])
    chunk = min(max(_LOGITS // student.config.vocab_size, 1), total)
    if not remat or chunk == total:
        return jnp.mean(function(*flat), axis=1)
    count = -(-total // chunk)
    padded = [
        jnp.pad(x, ((0, count * chunk - total), *[(0, 0)] * (x.ndim - 1))).reshape(
            count, chunk, *x.shape[1:]
        )
        for x in flat
    ]
    counts = jnp.arange(count * chunk).reshape(count, chunk) < total

    @jax.checkpoint
    def part(xs):
        *given, is_token = xs
        return jnp.sum(jnp.where(is_token, function(*given), 0.0), axis=1)

    return jnp.sum(jax.lax.map(part, (*padded, counts)), axis=0) / total


def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the loss of each target: `[n, v]`, `[n]` to float32 `[n]`."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen


def _divergence(logits: jax.Array, wanted: jax.Array, temperature: float) -> jax.Array:
    """Return T² KL between softened predictions: two `[n, v]` to `[n]`."""
    ours, theirs = (
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature, axis=1)
        for x in (logits, wanted)
    )
    return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=1)


def _hidden(ours: Pass, theirs: Pass, pairs: tuple[tuple[int, int], ...]) -> jax.Array:
    """Return the mean relative squared error of states, the embedding included."""
    errors = []
    for i, j in ((-1, -1), *pairs):
        x, y = (
            z.astype(jnp.float32) for z in (ours.states[i + 1], theirs.states[j + 1])
        )
        if x.shape != y.shape:
            raise ValueError(
                f"hidden states have {x.shape[-1]} channels in the student, "
                f"{y.shape[-1]} in the teacher: set the weight of hidden states to 0"
            )
        size = jnp.maximum(jnp.mean(y**2), jnp.finfo(jnp.float32).tiny)
        errors.append(jnp.mean((x - y) ** 2) / size)
    return jnp.mean(jnp.stack(errors))


def _attention(
    ours: Pass, theirs: Pass, pairs: tuple[tuple[int, int], ...]
) -> jax.Array:
    """Return the mean divergence of attention over blocks, heads and queries."""
    errors = []
    for i, j in pairs:
        x, y = (
            attention.log_probabilities(*heads)
            for heads in (ours.heads[i], theirs.heads[j])
        )
        if x.shape != y.shape:
            raise ValueError(
                f"attention has {x.shape[1]} heads in the student, {y.shape[1]} in the "
                "teacher: set the weight of attention to 0"
            )
        # For a key after its query, the product would be 0 times a huge difference.
        seen = jnp.exp(y) > 0
        errors.append(
            jnp.mean(jnp.sum(jnp.where(seen, jnp.exp(y) * (y - x), 0.0), axis=-1))
        )
    return jnp.mean(jnp.stack(errors))
