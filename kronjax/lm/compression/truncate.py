"""Lower ranks of layers as they are now: of matrices, of sums, and inside of factors.

    low rank           W ≈ U S Vᵀ                   by the SVD of the current kernel
    Kronecker sums     R(K) = Σ_k a_k b_kᵀ ≈ U S Vᵀ by QR of both sides and a small SVD
    inside of factors  A_k ≈ L_k R_k                by an SVD of each factor

`to_fraction` chooses the ranks for a fraction of the parameters of the dense kernel,
and `fractions` the fractions of stages, which fall geometrically: progressive low rank
trains between them. `nn.KroneckerLinear.truncate` leaves out terms of sums.

References: Hajimolahoseini et al. (2022), for progressive low rank; Van Loan and
Pitsianis (1993).

>>> [round(x, 3) for x in fractions(0.5, 3)]
[0.794, 0.63, 0.5]
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from kronjax import methods, nn, patterns
from kronjax.kronecker import to_arrays
from kronjax.lm.compression.moments import Moments
from kronjax.lm.models.base import LanguageModel, inner_layers
from kronjax.recipe import Rule
from kronjax.runs.closed_form import LowRank
from kronjax.runs.joint import Target

Method = Literal["low-rank", "interpolative"]
"""Names of the methods whose rank can be lowered."""


def fractions(to: float, stages: int) -> list[float]:
    """Return the fractions of the parameters that are left after each stage.

    Args:
        to: The fraction that is left in the end, between 0 and 1.
        stages: Number of stages.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not 0 < to < 1:
        raise ValueError(
            f"low rank keeps {to} of the parameters; write a fraction between 0 and 1"
        )
    if stages < 1:
        raise ValueError(f"{stages} stages; at least one is needed")
    return [to ** (i / stages) for i in range(1, stages + 1)]


def to_fraction(
    model: LanguageModel,
    fraction: float,
    *,
    match: str | Sequence[str] = "*",
    moments: Moments | None = None,
    method: str = "low-rank",
) -> list[str]:
    """Lower the ranks of layers until they have a fraction of the dense parameters.

    Args:
        model: Changed in place.
        fraction: Fraction of the parameters of each dense kernel.
        match: Names of layers, as in recipes; the head is left out.
        moments: Moments of inputs, and perhaps of gradients, to weight errors by. For
            Kronecker sums the plain error counts in any case.
        method: Method of `kronjax.methods` for dense and low-rank layers.

    Returns:
        The names of the layers that changed; layers that are small enough stay.

    Raises:
        ValueError: If none matches, or a layer cannot be truncated; names it.
    """
    layers = inner_layers(model)
    rule = Rule(match="*", method=method, fraction=fraction)
    changed = []
    for name in patterns.matching(match, layers):
        layer = layers[name]
        try:
            made = _smaller(layer, name, rule, moments)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if made is not layer:
            nn.replace(model, name, made)
            changed.append(name)
    return changed


def low_rank(
    layer: nn.Layer,
    rank: int,
    left: np.ndarray | None = None,
    right: np.ndarray | None = None,
    *,
    method: str = "low-rank",
) -> nn.Layer:
    """Return the layer of rank `rank` whose kernel is nearest to that of a layer.

    Args:
        layer: A layer of any kind; left as it is.
        rank: At least 1.
        left: Moment of the input, `[n_in, n_in]`, to weight the error by, or None.
        right: Moment of the gradient at the output, `[n_out, n_out]`, or None.
        method: Method of `kronjax.methods`, with a rank.
    """
    dense = nn.dense(layer)
    kernel = np.asarray(dense.kernel[...])
    target = Target("", np.asarray(kernel, np.float32), left, right)
    terms, _ = LowRank.of(target).fit(rank)
    factors = to_arrays((terms,))
    rule = Rule(match="*", method=method, rank=rank)
    return methods.find(method).layer(factors, dense, kernel.dtype, rule)


def inside(layer: nn.KroneckerLinear, side: Literal["a", "b"], rank: int) -> None:
    """Give all factors of one side of a Kronecker layer low rank, where it is smaller.

    Args:
        layer: Changed in place; factors that would not become smaller stay.
        side: `a` or `b`.
        rank: Rank of each factor.

    Raises:
        ValueError: If a factor is masked.
    """
    held: Any = getattr(layer, side)
    for c, part in enumerate(held):
        if isinstance(part, nn.MaskedFactor):
            raise ValueError("low rank inside of a factor would undo its mask")
        value = part[...]
        _, m, n = value.shape
        if rank * (m + n) >= m * n:
            continue
        u, s, vt = np.linalg.svd(np.asarray(value, np.float64), full_matrices=False)
        root = np.sqrt(s[:, :rank])
        left, right = u[:, :, :rank] * root[:, None], root[:, :, None] * vt[:, :rank]
        held[c] = nn.LowRankFactor(
            jnp.asarray(left, value.dtype), jnp.asarray(right, value.dtype)
        )


def _smaller(layer, name, rule, moments):
    """Return a layer with the fraction of a rule of the dense parameters, or itself."""
    structure, shape = nn.as_layer(layer), nn.shape_of(layer)
    if not structure.is_whole:
        raise ValueError(
            "masks, and low rank inside of factors, come after truncation, which would "
            "undo them"
        )
    fewer = structure.with_fewer_terms(rule.fraction * math.prod(shape))
    if fewer is not None:
        return fewer
    (configuration,) = methods.find(rule.method).configurations(rule, shape)
    if structure.rank <= configuration.rank:
        return layer
    left = right = None
    if moments is not None:
        left = moments.input(name)
        right = moments.output(name) if moments.outputs else None
    return low_rank(layer, configuration.rank, left, right, method=rule.method)
